"""`python -m vlm.data.encode`: its lines equal the peer's golden cases, field by field."""

import json
import os

import numpy as np
import pytest

from tests.data.samples import GOLDEN, row, write_jsonl
from tests.data.videos import write_video
from vlm.data.encode import main
from vlm.data.processor import Processor

CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
OWN_PIXELS = ("mode_exif6_jpg", "mode_rgba_png")
PLAIN = [
    case
    for case in CASES
    if not case["template_kwargs"]
    and "labels" in case
    and "@datauri" not in json.dumps(case["row"])
    and case["name"] not in OWN_PIXELS
]


def encode(tmp_path, rows, *arguments):
    data, out = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    fixed = ["--model", str(GOLDEN / "model"), "--media_root", str(GOLDEN), "--out", str(out)]
    assert main([str(data), *fixed, *arguments]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"{data}:{n + 1}" for n in range(len(rows))]
    return lines


def test_lines_equal_the_peers_cases(tmp_path):
    lines = encode(tmp_path, [case["row"] for case in PLAIN])
    compared = 0
    for case, line in zip(PLAIN, lines, strict=True):
        if "error" in line:
            continue  # the deliberate differences, which test_golden.py names one by one
        compared += 1
        for key in ("input_ids", "labels", "image_grid_thw"):
            assert line.get(key) == case.get(key), case["name"]
        positions = np.array(case["position_ids"]).reshape(3, -1).tolist()
        assert line["position_ids"] == positions
        if "pixel_values" in case:
            golden = case["pixel_values"]
            assert line["pixel_values"]["shape"] == golden["shape"]
            for key, tolerance in (("mean", 1e-5), ("std", 1e-5), ("row_sum_first8", 1e-3)):
                np.testing.assert_allclose(
                    line["pixel_values"][key], golden[key], atol=tolerance, rtol=1e-6
                )
    assert compared > 20


def test_weights_prompts_and_videos(tmp_path):
    (weighted,) = (c for c in CASES if c["template_kwargs"] == {"is_binary_loss_scale": False})
    clip = write_video(tmp_path / "clip.mp4", 16, 60, 90, 4)
    seen = row("<image><video>?") | {"images": [str(GOLDEN / "images/sq56.png")]}
    seen["videos"] = [str(tmp_path / clip)]
    data, out = write_jsonl(tmp_path / "d.jsonl", [weighted["row"], seen]), tmp_path / "o.jsonl"
    assert main([str(data), "--model", str(GOLDEN / "model"), "--out", str(out)]) == 0
    scaled, both = map(json.loads, out.read_text().splitlines())
    assert scaled["loss_scale"] == weighted["loss_scale"]
    assert both["image_grid_thw"] == [[1, 4, 4]]
    ((t, h, w),) = both["video_grid_thw"]
    assert t == 4 and both["second_per_grid_ts"] == [1.0]
    assert both["pixel_values"]["shape"] == [16 + t * h * w, 1176]


def test_a_prompt_ends_where_the_answer_begins(tmp_path):
    (line,) = encode(tmp_path, [{"messages": [{"role": "user", "content": "hi"}]}], "--prompt")
    (case,) = encode(tmp_path, [row("hi", "ok")])
    assert set(line["labels"]) == {-100}
    first = next(n for n, label in enumerate(case["labels"]) if label != -100)
    assert line["input_ids"] == case["input_ids"][:first]


def test_bad_samples_and_truncation(tmp_path):
    rows = [row("a" * 400), b"{", row("x", ""), row()]
    reasons = [line.get("error", "") for line in encode(tmp_path, rows, "--max_length", "60")]
    assert "more than max_length 60" in reasons[0] and "not a line of JSON" in reasons[1]
    assert reasons[3] == ""
    (cut, *_) = encode(tmp_path, rows, "--max_length", "60", "--truncation", "left")
    assert len(cut["input_ids"]) == 60


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--max_length", "0"], "must be above 0"),
        (["--max_pixels", "10"], "below min_pixels"),
        (["--out", "."], "--out . is a directory; name a file"),
        (["--out", "none/x"], "there is no directory none; make it first"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, reason, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", [row()])
    fixed = ["--model", str(GOLDEN / "model"), "--out", str(tmp_path / "out.jsonl")]
    assert main([str(data), *fixed, *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_answer_of_a_training_row_is_no_part_of_its_prompt(tmp_path):
    asked, trained = {"messages": [{"role": "user", "content": "hi"}]}, row("hi", "ok")
    alone = {"messages": [{"role": "assistant", "content": "hi"}]}
    first, second, third = encode(tmp_path, [asked, trained, alone], "--prompt")
    assert first["input_ids"] == second["input_ids"]
    assert third["error"] == "has an answer and nothing before it"


def test_names_that_are_no_text_are_escaped(tmp_path):
    data = tmp_path / os.fsdecode(b"\xff.jsonl")
    write_jsonl(data, [row(), row("<image>", images=["\udcfe.png"])])
    out = tmp_path / "out.jsonl"
    assert main([str(data), "--model", str(GOLDEN / "model"), "--out", str(out)]) == 0
    good, bad = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert good["id"].endswith(".jsonl:1") and "udcfe.png does not exist" in bad["error"]


def test_a_video_that_holds_less_than_it_tells_is_bad(tmp_path):
    path = tmp_path / write_video(tmp_path / "holed.avi", 40, 240, 320, 3.7, "MJPG")
    content, third = path.read_bytes(), path.stat().st_size // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])
    (line,) = encode(tmp_path, [row("<video>?", videos=[str(path)])], "--media_root", str(tmp_path))
    assert "fewer frames can be decoded" in line["error"]


def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Processor, "encode", interrupted)
    data = write_jsonl(tmp_path / "data.jsonl", [row()])
    fixed = ["--model", str(GOLDEN / "model"), "--out", str(tmp_path / "out.jsonl")]
    assert main([str(data), *fixed]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written"
    assert os.listdir(tmp_path) == ["data.jsonl"]

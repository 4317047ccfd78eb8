"""`python -m vlm.data.check`: everything is decoded, counted and told apart by its reason."""

import json
import os
import signal

import pytest

from tests.data.samples import GOLDEN, damage, row, write_image, write_jsonl
from tests.data.videos import write_video
from tests.tiny import write_hybrid
from vlm.data import check as checking
from vlm.data.check import general, main
from vlm.data.processor import Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    for name in ("ok.png", "cut.jpg"):
        write_image(folder / name, 56, 84)
    damage(folder / "cut.jpg")
    write_video(folder / "clip.mp4", 8, 56, 56, 4)
    rows = [row("<image>?", images=["ok.png"]), row("<video>?") | {"videos": ["clip.mp4"]}]
    rows += [row("<image>?", images=["cut.jpg"]), b"{", row("<image><image>"), row("<image>")]
    write_jsonl(folder / "mixed.jsonl", [*rows, row("hi"), row("word " * 200)])
    write_jsonl(folder / "clean.jsonl", [row(f"number {n}") for n in range(600)])
    return folder


def run(folder, *arguments, model=GOLDEN / "model"):
    files = [str(folder / a) if str(a).endswith("jsonl") else str(a) for a in arguments]
    return main([*files, "--model", str(model), "--max_length", "100"])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_table_and_its_json(folder, tmp_path, workers, capsys):
    found = tmp_path / "found.json"
    fixed = ("--workers", workers, "--json", found)
    assert run(folder, "mixed.jsonl", "clean.jsonl", *fixed) == 0, "0.8 % are allowed"
    out, found = capsys.readouterr().out, json.loads(found.read_text())
    mixed, clean = found["sources"]
    assert (mixed["rows"], mixed["good"], mixed["bad"]) == (8, 3, 5)
    assert (mixed["images"], mixed["videos"], mixed["too_long"]) == (1, 1, 1)
    assert (clean["name"], clean["rows"], clean["good"], clean["bad"]) == ("clean", 600, 600, 0)
    assert mixed["longest"] > 200 > 100 > clean["longest"]
    assert [entry["id"].rpartition(":")[2] for entry in found["bad"]] == ["3", "4", "5", "6", "8"]
    assert [kind["count"] for kind in found["reasons"]] == [2, 1, 1, 1]
    assert found["reasons"][0]["first"] == f"{folder}/mixed.jsonl:5"
    assert "2 bad: … <image> tags but … images; give one each" in out
    assert f"{folder}/mixed.jsonl:3: {folder}/cut.jpg is damaged" in out


def test_totals_are_those_of_the_examples(folder, tmp_path):
    found = tmp_path / "found.json"
    arguments = ("mixed.jsonl", "--json", found, "--max_bad_fraction", 1, "--truncation", "left")
    assert run(folder, *arguments, "--workers", 1) == 0
    (mixed,) = json.loads(found.read_text())["sources"]
    assert (mixed["good"], mixed["too_long"]) == (4, 1)
    ours = Processor.from_pretrained(GOLDEN / "model", max_length=100, truncation="left")
    (source,) = checking.open_data(
        checking.parse_arguments([f"{folder}/mixed.jsonl", "--model", str(GOLDEN / "model")])
    )[0]
    (chunk,) = source.chunks()
    good = [ours.encode(source.parse(chunk.rows[n], chunk.places[n])) for n in (0, 1, 6, 7)]
    assert mixed["tokens"] == sum(example.length for example in good)
    assert mixed["learnt"] == sum(int((example.targets != -100).sum()) for example in good)


def test_too_many_bad_samples_are_exit_code_1(folder, capsys):
    assert run(folder, "mixed.jsonl", "--workers", 1) == 1
    assert "5 of 8 samples are bad, more than max_bad_fraction 0.01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["absent.jsonl"], "does not exist"),
        (["empty.jsonl"], "there is no sample in it"),
        (["clean.jsonl", "--json", "nodir/x"], "there is no directory nodir"),
        (["clean.jsonl", "--model", "/absent/model"], "/absent/model"),
        (["mixed.jsonl#2", "--prove_packing", "2", "--max_pixels", "1"], "max_pixels"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(folder, arguments, reason, capsys):
    write_jsonl(folder / "empty.jsonl", [])
    given = [str(folder / a) if ".jsonl" in a else a for a in arguments]
    assert main(["--model", str(GOLDEN / "model"), *given]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_process_that_dies_is_told_with_its_place(folder, monkeypatch, capsys):
    encode = Processor.encode

    def deadly(self, sample):
        if sample.id.endswith("clean.jsonl:300"):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, sample)

    monkeypatch.setattr(Processor, "encode", deadly)
    assert run(folder, "clean.jsonl", "--workers", 2) == 2
    error = capsys.readouterr().err
    assert "a process died at" in error and "clean.jsonl:" in error


def test_a_video_with_a_hole_is_bad(tmp_path, capsys):
    """The loader of a run would find other sizes than the index, and leave it out too."""
    name = write_video(tmp_path / "holed.avi", 40, 240, 320, 3.7, "MJPG")
    content = (tmp_path / name).read_bytes()
    third = len(content) // 3
    (tmp_path / name).write_bytes(content[:third] + bytes(third) + content[2 * third :])
    write_jsonl(tmp_path / "d.jsonl", [row("hi"), row("<video>?") | {"videos": [name]}])
    fixed = ["--model", str(GOLDEN / "model"), "--workers", "1"]
    assert main([str(tmp_path / "d.jsonl"), *fixed]) == 1
    assert "d.jsonl:2: has a video of which fewer frames" in capsys.readouterr().out


def test_reasons_of_one_kind_are_one():
    pairs = [
        ("/a/b c.png does not exist", "/x/y.png does not exist"),
        ("message 0 has role 'bot'; use system", "message 12 has role 'b t'; use system"),
        ("has 101 tokens, more than max_length 80", "has 1202 tokens, more than max_length 80"),
        ("an image of 30 bytes is damaged (eof)", "an image of 5,000 bytes is damaged (eof)"),
    ]
    for one, other in pairs:
        assert general(one) == general(other)
    assert len({general(one) for one, _ in pairs}) == len(pairs)


def test_the_proof_of_packing_by_command(folder, tmp_path, capsys):
    model, found = write_hybrid(tmp_path / "model"), tmp_path / "found.json"
    arguments = ("mixed.jsonl", "--max_bad_fraction", 1, "--prove_packing", 9, "--json", found)
    assert run(folder, *arguments, "--workers", 1, model=model) == 0
    out = capsys.readouterr().out
    assert "packing 3 samples" in out and "5 bad samples left out" in out
    assert json.loads(found.read_text())["packing"]["holds"]


def test_ctrl_c_is_one_line(folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, "check_chunk", interrupted)
    assert run(folder, "clean.jsonl", "--workers", 1) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"

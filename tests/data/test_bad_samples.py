"""Every kind of bad input is one clear sentence that names file and line; the rest goes on."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.samples import (
    GOLDEN,
    assistant,
    damage,
    index_of,
    processor,
    row,
    sample,
    user,
    write_image,
    write_jsonl,
)
from vlm.data.loader import StepDataset, make_plan
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.schema import BadSample
from vlm.data.sources import DataError

PICTURE = "<image>what?"


def messages(*given):
    return {"messages": list(given)}


BAD = [
    (b"{", "not a line of JSON"),
    (b"\xff\xfe\xfd", "not a line of JSON"),
    (b"[1, 2]", "no list of messages"),
    (b"3", "no list of messages"),
    ({}, "no list of messages"),
    ({"messages": None}, "no list of messages"),
    ({"messages": "hi"}, "no list of messages"),
    (messages(), "messages is empty"),
    (messages("hi"), "message 0 has no role"),
    (messages({"content": "a"}), "message 0 has no role"),
    (messages({"role": None, "content": "a"}), "message 0 has no role"),
    (messages({"role": "", "content": "a"}), "message 0 has role ''"),
    (messages(user("a"), {"role": "bot", "content": "b"}), "message 1 has role 'bot'"),
    (messages(user("a"), {"role": "tool_call", "content": "{}"}), "tool call without a name"),
    (messages(user("a"), {"role": "system", "content": "b"}), "only the first may"),
    (messages({"role": "user"}, assistant("b")), "content None, not text"),
    (messages(user(float("nan")), assistant("b")), "content nan, not text"),
    (messages(user(7), assistant("b")), "content 7, not text"),
    (messages(user([{"type": "audio"}]), assistant("b")), "part of type 'audio'"),
    (messages(user(["a"]), assistant("b")), "part of type None"),
    (messages(user("a")), "ends with a user message"),
    (messages({"role": "system", "content": "a"}), "nothing else"),
    (messages(user("a"), assistant("b", loss=False)), "nothing to learn"),
    (messages(user("a"), assistant("b", loss_scale=0)), "nothing to learn"),
    (messages(user("a"), assistant("b", loss="no")), "loss 'no'"),
    (messages(user("a"), assistant("b", loss_scale="x")), "loss_scale x"),
    (messages(user("a"), assistant("b", loss_scale=True)), "loss_scale True"),
    (messages(user("a"), assistant("b", loss_scale=float("nan"))), "loss_scale nan"),
    (
        messages(user("a"), assistant("b", loss_scale=0.5), assistant("c")),
        "different loss weights",
    ),
    (row(PICTURE), "1 <image> tags but 0 images"),
    (row("no tag", images=["ok.png"]), "0 <image> tags but 1 images"),
    (row(PICTURE, images=["ok.png", "ok.png"]), "1 <image> tags but 2 images"),
    (row(PICTURE) | {"images": float("nan")}, "images is not a list"),
    (row(PICTURE, images=[None]), "an image is given as None"),
    (row(PICTURE, images=[""]), "an image is given as ''"),
    (row(PICTURE, images=[5]), "an image is given as 5"),
    (row(PICTURE, images=[{"uri": "x"}]), "an image is given as None"),
    (row(PICTURE, images=["http://x.example/a.png"]), "images are not fetched"),
    (row(PICTURE, images=["data:image/png;base64,!!"]), "base64 is damaged"),
    (row(PICTURE, images=[{"bytes": "AAAA"}]), "an image of 3 bytes is not an image"),
    (row(PICTURE, images=["absent.png"]), "absent.png does not exist"),
    (row(PICTURE, images=["folder"]), "folder is a directory"),
    (row(PICTURE, images=["notes.txt"]), "notes.txt is not an image"),
    (row(PICTURE, images=["a\0b.png"]), "is not an image"),
    (row(PICTURE, images=["x" * 5000]), "is not an image"),
    (row(PICTURE, images=["thin.png"]), "more than 200 times"),
    (row("see <|image_pad|>"), r"has <\|image_pad\|> in its text"),
    (row("hi", "<|video_pad|>"), r"has <\|video_pad\|> in its text"),
    (row("<|vision_end|>"), r"has <\|vision_end\|> in its text"),
    (row("word " * 99), "more than max_length 80"),
    (row(videos=["a.mp4"]), "0 <video> tags but 1 videos"),
    (messages(user("<ima"), user("ge>"), assistant("b")), "two messages hold a half"),
    (row("<video>"), "1 <video> tags but 0 videos"),
    (row("<video>") | {"videos": {"path": "a.mp4"}}, "videos is not a list"),
    (row(audios=["a.wav"]), "audios are not supported"),
    (row(tools="[3]"), "tool 0 is 3"),
    (row(objects={"bbox": [[1, 2, 3, 4]]}), "0 <bbox> tags but 1 boxes"),
    (b"[" * 100_000, "JSON"),
    (b'{"messages": ' + b"1" * 5000 + b"}", "JSON"),
    (row("\ud800"), "surrogate"),
    (
        row(PICTURE, images=["data:image/png;base64,é"]),
        "base64",
    ),
    (
        messages(user("a"), assistant("b", loss_scale=10**400)),
        "loss_scale",
    ),
    (
        messages(user("a"), assistant("b", loss_scale=-1)),
        "loss_scale -1",
    ),
    (row("<|vision_pad|>"), "vision_pad"),
]


@pytest.fixture
def folder(tmp_path):
    write_image(tmp_path / "ok.png", 56, 56)
    Image.fromarray(np.zeros((2, 402, 3), dtype=np.uint8)).save(tmp_path / "thin.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_named_and_its_neighbours_stay(folder, line, reason):
    good = row(PICTURE, images=["ok.png"])
    file = write_jsonl(folder / "data.jsonl", [good, line, good])
    ours = processor(max_length=80)
    index, bad = index_of([file], ours)
    assert [entry.id for entry in bad] == [f"{file}:2"]
    with pytest.raises(BadSample, match=reason):
        raise BadSample(bad[0].id, bad[0].reason)
    assert "\n" not in bad[0].reason
    assert index.line.tolist() == [1, 3]


def test_a_file_damaged_behind_its_header_is_found_at_decoding(folder):
    write_image(folder / "cut.jpg", 64, 64)
    file = write_jsonl(folder / "data.jsonl", [row(PICTURE, images=[damage(folder / "cut.jpg")])])
    ours = processor()
    index, bad = index_of([file], ours)
    assert not bad
    with pytest.raises(BadSample, match=r"data\.jsonl:1: .*cut\.jpg is damaged"):
        ours.encode(index.sample(0))


def put_media(folder):
    """Damaged media of every kind; `huge.png` only claims its pixels."""
    write_image(folder / "cut.jpg", 64, 64)
    damage(folder / "cut.jpg")
    (folder / "empty.png").write_bytes(b"")
    (folder / "random.jpg").write_bytes(bytes(range(256)) * 4)
    (folder / "random.mp4").write_bytes(bytes(range(256)) * 4)
    (folder / "empty.mp4").write_bytes(b"")
    content = bytearray((folder / "ok.png").read_bytes())
    content[16:24] = (10_000).to_bytes(4, "big") * 2  # IHDR: width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (folder / "huge.png").write_bytes(content)


NAMED = {
    "missing image": (row(PICTURE, images=["absent.png"]), "absent.png does not exist"),
    "corrupt image": (row(PICTURE, images=["random.jpg"]), "random.jpg is not an image"),
    "truncated image": (row(PICTURE, images=["cut.jpg"]), "cut.jpg is damaged"),
    "zero-byte image": (row(PICTURE, images=["empty.png"]), "empty.png is not an image"),
    "huge image": (row(PICTURE, images=["huge.png"]), "10000 x 10000 pixels, too many"),
    "missing video": (row("<video>", videos=["absent.mp4"]), "absent.mp4 does not exist"),
    "corrupt video": (row("<video>", videos=["random.mp4"]), "random.mp4"),
    "zero-byte video": (row("<video>", videos=["empty.mp4"]), "empty.mp4"),
    "count mismatch": (row(PICTURE), "1 <image> tags but 0 images"),
    "empty role": (messages({"role": "", "content": "a"}), "message 0 has role ''"),
    "unknown role": (messages({"role": "bot", "content": "b"}), "message 0 has role 'bot'"),
    "nothing to learn": (messages(user("a"), assistant("b", loss=False)), "nothing to learn"),
    "too long": (row("word " * 99), "more than max_length 80"),
    "vision tokens in text": (row("<|image_pad|>"), r"has <\|image_pad\|> in its text"),
    "NaN field": (messages(user(float("nan")), assistant("b")), "content nan, not text"),
    "None field": (messages(user(None), assistant("b")), "content None, not text"),
    "invalid JSON line": (b'{"messages": [', "not a line of JSON"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_kind_is_recorded_with_its_place_and_skipped_alike_on_every_rank(folder, name):
    put_media(folder)
    line, reason = NAMED[name]
    good = row(PICTURE, images=["ok.png"])
    file = write_jsonl(folder / "data.jsonl", [good, line, good])
    ours, found = processor(max_length=80), []
    for _ in range(2):
        index, bad = index_of([file], ours)
        costs = index.length.astype(float)
        ranks = [
            StepDataset(index, ours, make_plan(index, costs, 3, 0, 2, Budget(tokens=80)), rank)
            for rank in range(2)
        ]
        steps = [dataset[Position(0, 0)] for dataset in ranks]
        (entry,) = bad + [entry for step in steps for entry in step.bad]
        assert entry.id == f"{file}:2" and re.search(reason, entry.reason)
        ids = sorted(name for step in steps for name in step.ids)
        assert ids == [f"{file}:1", f"{file}:3"]
        assert len({len(step.micro_batches) for step in steps}) == 1
        found.append((entry, [step.ids for step in steps]))
    assert found[0] == found[1]


def test_every_way_to_give_an_image_gives_the_same(folder):
    data = base64.b64encode((folder / "ok.png").read_bytes()).decode()
    uri = f"data:image/png;base64,{data}"
    rows = [
        row(PICTURE, images=["ok.png"]),
        row(PICTURE, images=[str(folder / "ok.png")]),
        row(PICTURE, images=[f"file://{folder}/ok.png"]),
        row(PICTURE, images=[{"path": "ok.png"}]),
        row(PICTURE, images=[{"bytes": data, "path": None}]),
        row(PICTURE, images=[uri]),
    ]
    for part in (
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": "ok.png"},
        {"type": "image", "image": "ok.png"},
    ):
        rows.append(messages(user([part, {"type": "text", "text": "what?"}]), assistant("ok")))
    file = write_jsonl(folder / "data.jsonl", rows)
    ours = processor()
    index, bad = index_of([file], ours)
    assert not bad
    first, *others = (ours.encode(index.sample(number)) for number in range(len(index)))
    for other in others:
        assert other.input_ids.equal(first.input_ids)
        assert other.patches.equal(first.patches)


def test_blank_lines_and_unknown_columns_do_no_harm(tmp_path):
    rows = [row("a"), b"", b"  ", row("b", source="web", videos=[]) | {"images": None}, b"\r"]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte order mark
    index, bad = index_of([file], processor())
    assert not bad
    assert index.line.tolist() == [1, 4]
    assert [index.sample(number).messages[0].content for number in (0, 1)] == ["a", "b"]


def test_files_that_are_no_data_are_refused(tmp_path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    broken = write_jsonl(tmp_path / "broken.jsonl", [b"{"])
    (tmp_path / "data.csv").write_text("a,b")
    for path, reason in [
        (tmp_path / "absent.jsonl", "does not exist"),
        (tmp_path / "data.csv", "only .jsonl"),
        (empty, "no sample to learn from"),
        (broken, r"no sample to learn from.*broken\.jsonl:1: not a line of JSON"),
    ]:
        with pytest.raises(DataError, match=reason):
            index_of([path], processor())


@pytest.mark.parametrize(
    "options",
    [{"truncation": "delte"}, {"min_pixels": 2_000_000}, {"min_pixels": 0, "max_pixels": 0}],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        processor(**options)


def edited_model(tmp_path, edit):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((GOLDEN / "model" / name).read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    edit(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tmp_path


def test_a_tokenizer_with_other_media_ids_is_refused(tmp_path):
    folder = edited_model(tmp_path, lambda tokenizer: None)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"], config["video_token_id"] = 4013, 4012
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"image_pad.* is 4012 in the tokenizer, but 4013"):
        type(processor()).from_pretrained(folder)


def test_a_tokenizers_own_truncation_is_switched_off(tmp_path):
    def shorten(tokenizer):
        tokenizer["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    ours = type(processor()).from_pretrained(edited_model(tmp_path, shorten))
    assert ours.encode(sample(user("word " * 50), assistant("ok"))).length > 50

"""Videos in samples: every way to give one, beside images, packed, damaged, and in a run."""

import base64
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.samples import index_of, processor, row, write_image, write_jsonl
from tests.data.videos import write_clips, write_video
from tests.train.runs import log_of, run_plain, write_hybrid
from train.command_line import parse
from train.config import TrainConfig, UsageError
from vlm.data.collate import collate
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.limits import environment_limits
from vlm.data.schema import BadSample


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def mixed(clips):
    write_image(clips / "wide.png", 56, 112)
    write_image(clips / "tall.png", 112, 56, seed=1)
    content = "<image>a<video><video>b<image>"
    media = {"images": ["wide.png", "tall.png"], "videos": ["five.avi", "landscape.mp4"]}
    return parse_row(row(content, **media), "data.jsonl:1", RowContext(clips))


def test_images_and_videos_keep_their_order(clips, mixed):
    ours = processor()
    example = ours.encode(mixed)
    alone = [
        ours.encode(parse_row(row(f"<{kind}>", **{f"{kind}s": [name]}), "alone", RowContext(clips)))
        for kind, name in [
            ("image", "wide.png"),
            ("video", "five.avi"),
            ("video", "landscape.mp4"),
            ("image", "tall.png"),
        ]
    ]
    assert example.grid_thw == tuple(one.grid_thw[0] for one in alone)
    assert example.patches.equal(torch.cat([one.patches for one in alone]))
    assert example.second_per_grid == sum((one.second_per_grid for one in alone), ())
    config = ours.config
    kinds = [config.image_token_id, config.video_token_id, config.video_token_id]
    runs = [token for token in example.input_ids.tolist() if token in kinds]
    expected = []
    for kind, (t, h, w) in zip([*kinds, config.image_token_id], example.grid_thw, strict=True):
        expected += [kind] * (t * h * w // 4)
    assert runs == expected
    assert ours.measure(mixed).length == example.length


def test_truncation_cuts_text_and_never_a_video(clips):
    sample = parse_row(row("<video>" + "word " * 99, videos=["five.avi"]), "x", RowContext(clips))
    whole = processor().encode(sample)
    cut = processor(max_length=whole.length - 50, truncation="left").encode(sample)
    assert cut.length == whole.length - 50
    assert cut.patches.equal(whole.patches) and cut.second_per_grid == whole.second_per_grid


def test_packed_samples_are_those_that_went_in(clips, mixed):
    ours = processor()
    video = parse_row(row("<video>", videos=["three.mp4"]), "v", RowContext(clips))
    examples = [
        ours.encode(sample) for sample in (mixed, parse_row(row(), "t", RowContext(clips)), video)
    ]
    batch = collate(examples, ours.config)
    assert batch.patches.equal(torch.cat([example.patches for example in examples]))
    assert batch.position_ids.equal(torch.cat([e.position_ids for e in examples], dim=1))
    assert len(batch.visual_rows) * 4 == len(batch.patches)
    frames = [h * w for e in examples for t, h, w in e.grid_thw for _ in range(t)]
    assert batch.vision.frames.lengths == tuple(frames)


def test_every_way_to_give_a_video_gives_the_same(clips):
    content = (clips / "five.avi").read_bytes()
    data = base64.b64encode(content).decode()
    uri = f"data:video/avi;base64,{data}"
    given = ["five.avi", f"file://{clips}/five.avi", {"path": "five.avi"}, {"bytes": data}, uri]
    rows = [row("<video>what?", videos=[video]) for video in given]
    for part in (
        {"type": "video_url", "video_url": {"url": uri}},
        {"type": "video_url", "video_url": "five.avi"},
        {"type": "video", "video": "five.avi"},
    ):
        rows.append(row([part, {"type": "text", "text": "what?"}]))
    index, bad = index_of([write_jsonl(clips / "ways.jsonl", rows)], processor())
    assert not bad
    first, *others = (processor().encode(index.sample(number)) for number in range(len(index)))
    for other in others:
        assert other.input_ids.equal(first.input_ids)
        assert other.patches.equal(first.patches)
        assert other.position_ids.equal(first.position_ids)


def test_a_list_of_frames_is_a_video_that_is_sampled_already(clips):
    names = [write_image(clips / f"{number}.png", 120, 160, number) for number in range(15)]

    def encode(frames, **options):
        return processor(**options).encode(
            parse_row(row("<video>", videos=[frames]), "x", RowContext(clips))
        )

    five = encode(names[:5])
    assert five.grid_thw == ((3, 8, 12),) and five.second_per_grid == (1.0,)
    last = five.patches.view(3, 96, 3, 2, 196)[2]
    assert last[:, :, 0].equal(last[:, :, 1]), "the fifth frame stands twice"
    assert encode(names[:5], fps=4.0).second_per_grid == (0.5,)
    with pytest.raises(BadSample, match="has 15 frames, more than fps_max_frames 12; take fewer"):
        encode(names)
    assert encode(names, fps_max_frames=15).grid_thw == ((8, 8, 12),)
    part = {"type": "video", "video": names[:5]}
    inline = processor().encode(parse_row(row([part]), "x", RowContext(clips)))
    assert inline.patches.equal(five.patches)


@pytest.fixture
def broken(clips, tmp_path):
    content = (clips / "landscape.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "folder").mkdir()
    write_video(tmp_path / "one.mp4", 1, 64, 64, 10)
    write_video(tmp_path / "bomb.avi", 4, 64, 64, 10, "I420")
    content = bytearray((tmp_path / "bomb.avi").read_bytes())
    place = content.index(b"strf") + 12
    content[place : place + 8] = struct.pack("<ii", 16000, 16000)
    (tmp_path / "bomb.avi").write_bytes(content)
    write_video(tmp_path / "thin.avi", 4, 2, 600, 10, "FFV1")
    write_image(tmp_path / "a.png", 56, 56)
    write_image(tmp_path / "b.png", 56, 84)
    return tmp_path


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        ("absent.mp4", "absent.mp4 does not exist"),
        ("folder", "folder is a directory"),
        ("a\0b.mp4", "cannot be opened"),
        ("text.mp4", "text.mp4 is not a video that can be read"),
        ("cut.mp4", "cut.mp4 is not a video that can be read, or is cut off"),
        ("one.mp4", "one.mp4 has 1 frames by its header"),
        ("a.png", "a.png has 0 frames by its header"),
        ("bomb.avi", "frames of 16000 x 16000 pixels, which cannot be decoded"),
        ("thin.avi", "more than 200 times"),
        ({"bytes": "AAAA"}, "a video of 3 bytes is not a video"),
        ("data:video/mp4;base64,!!", "a video's base64 is damaged"),
        ("https://x.example/a.mp4", "videos are not fetched"),
        (None, "a video is given as None"),
        ([], "a list of 0 frames is no video"),
        (["a.png"], "a list of 1 frames is no video"),
        (["a.png", "absent.png"], "absent.png does not exist"),
        (["a.png", "b.png"], "b.png is 84 x 56, the frames before it 56 x 56"),
        (["a.png", ["a.png"]], "an image is given as"),
    ],
)
def test_a_bad_video_is_named(broken, video, reason):
    file = write_jsonl(broken / "data.jsonl", [row(), row("<video>", videos=[video])])
    index, (bad,) = index_of([file], processor())
    assert len(index) == 1 and bad.id == f"{file}:2"
    with pytest.raises(BadSample, match=reason):
        raise BadSample(bad.id, bad.reason)
    assert "\n" not in bad.reason


def test_a_video_with_no_frame_to_decode_is_found_at_decoding(clips, tmp_path):
    content = (clips / "two.avi").read_bytes()
    start = content.index(b"movi") + 24
    (tmp_path / "hollow.avi").write_bytes(content[:start] + bytes(len(content) - start - 64))
    sample = parse_row(row("<video>", videos=["hollow.avi"]), "data.jsonl:1", RowContext(tmp_path))
    assert processor().measure(sample).grid_thw == ((1, 8, 8),)
    with pytest.raises(BadSample, match=r"data\.jsonl:1: .*hollow\.avi is damaged: not one frame"):
        processor().encode(sample)


def test_a_frame_whose_header_lies_is_found_at_decoding(tmp_path, monkeypatch):
    """No file that Pillow opens is known to lie so; a decoder of another version may differ."""
    write_image(tmp_path / "a.png", 56, 84)
    for module in ("media", "video"):
        monkeypatch.setattr(f"vlm.data.{module}.header_size", lambda _: (84, 56))
    for sample in (row("<video>", videos=[["a.png", "a.png"]]), row("<image>", images=["a.png"])):
        with pytest.raises(BadSample, match=r"a\.png has a header that lies of its size"):
            processor().encode(parse_row(sample, "data.jsonl:1", RowContext(tmp_path)))


@pytest.mark.parametrize(
    "options", [{"fps": 0}, {"fps": 31}, {"fps_max_frames": 1}, {"video_max_pixels": 12543}]
)
def test_limits_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        processor(**options)
    with pytest.raises(UsageError, match=next(iter(options))):
        TrainConfig("model", ["data.jsonl"], "run", **options)


def test_the_environment_sets_limits_that_yield_to_the_command_line(monkeypatch):
    required = ["--model", "m", "--dataset", "d.jsonl", "--output_dir", "o"]
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "100352")
    monkeypatch.setenv("FPS_MAX_FRAMES", "32")
    assert environment_limits() == {"video_max_pixels": 100352, "fps_max_frames": 32}
    config = parse([*required, "--fps_max_frames", "8"])
    assert (config.video_max_pixels, config.fps_max_frames, config.fps) == (100352, 8, 2.0)


def test_a_run_learns_from_a_video(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FPS_MAX_FRAMES", "6")
    rows = [row("<video>what?", "a pattern", videos=[str(clips / "landscape.mp4")]), row()]
    setting = {
        "model": write_hybrid(tmp_path / "model"),
        "dataset": [str(write_jsonl(tmp_path / "data.jsonl", rows))],
    }
    options = {"max_steps": 1, "global_batch_size": 2, "fps_max_frames": 6}
    run = run_plain(setting, tmp_path / "run", **options)
    (step,) = [entry for entry in log_of(run) if entry["event"] == "train"]
    assert "fps_max_frames 6 (fps_max_frames from FPS_MAX_FRAMES)" in capsys.readouterr().out
    assert np.isfinite(step["loss"]) and step["grad_norm"] > 0

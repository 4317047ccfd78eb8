"""The frames, pixels, seconds and positions of a video are a server's.

Witnesses, in a process of their own: transformers' Qwen2VLVideoProcessor, which samples all frames
of a file, and, where it is installed, vLLM's own loader, which is also asked of damaged files.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.samples import GOLDEN, processor, row
from tests.data.videos import CLIPS, HAS_VLLM, LIMITS, UNUSUAL, ask, write_clips
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.video import VideoInfo, sample_indices, seconds_per_grid
from vlm.hf_config import read_config
from vlm.rope import mrope_positions
from vlm.vision import IMAGE_MEAN, IMAGE_STD


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def witnesses(clips) -> dict[str, dict]:
    found = {"transformers": ask(clips, CLIPS, False)}
    if HAS_VLLM:
        found["vllm"] = ask(clips, (*CLIPS, *UNUSUAL), True)
    return found


def normalised(patches: torch.Tensor) -> np.ndarray:
    levels = patches.numpy().astype(np.float64).reshape(len(patches), 3, -1) / 255
    mean, std = (np.array(values)[:, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return ((levels - mean) / std).reshape(len(patches), -1)


def same_as(witness: dict, folder: Path, name: str) -> None:
    for number, (fps, most) in enumerate(LIMITS):
        ours = processor(fps=fps, fps_max_frames=most)
        sample = parse_row(row("<video>what?", videos=[name]), "data.jsonl:1", RowContext(folder))
        if name == "holed.avi":  # its header knows nothing of the hole: it is not learnt from
            example = ours.prompt(replace(sample, messages=sample.messages[:1]))
        else:
            example = ours.encode(sample)
        theirs = {
            key: witness[f"{folder / name} {number} {key}"]
            for key in ("pixels", "grid", "indices", "seconds")
        }
        assert example.grid_thw == (tuple(theirs["grid"]),)
        assert np.abs(normalised(example.patches) - theirs["pixels"]).max() < 1e-5
        assert example.second_per_grid == (float(theirs["seconds"]),)
        (medium,) = ours.reader.measure(sample)
        assert set(theirs["indices"]) <= set(medium.frames)
        if name != "holed.avi":
            assert list(medium.frames) == list(theirs["indices"])
            sizes = ours.measure(sample)
            assert (sizes.length, sizes.grid_thw) == (example.length, example.grid_thw)
            assert sizes.targets == (example.targets >= 0).sum()


@pytest.mark.parametrize("name", CLIPS)
def test_frames_pixels_and_seconds_are_those_of_transformers(witnesses, clips, name):
    same_as(witnesses["transformers"], clips, name)


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
@pytest.mark.parametrize("name", [*CLIPS, *UNUSUAL])
def test_frames_pixels_and_seconds_are_those_of_vllm(witnesses, clips, name):
    same_as(witnesses["vllm"], clips, name)


def test_sampled_indices_and_seconds_follow_the_rule():
    rng = np.random.default_rng(0)
    more = 0
    for _ in range(3000):
        frames, fps = int(rng.integers(2, 5000)), float(rng.choice([25, 30000 / 1001, 7.3]))
        wanted, most = float(rng.uniform(0.1, 30)), int(rng.integers(2, 769))
        count = int(min(max(frames / fps * wanted, 4), min(most, frames) // 2 * 2)) // 2 * 2
        step = frames / count
        places = np.float32(0) + np.arange(np.ceil(frames / step)) * step
        expected = np.minimum(places.astype(np.float32).astype(int), frames - 1)
        info = VideoInfo(frames, fps, 64, 64)
        indices = sample_indices(info, wanted, 4, most, 2)
        assert indices == sorted(set(expected.tolist()))
        more += len(indices) > count
        average = len(indices) / frames * fps
        assert seconds_per_grid(len(indices), info, 2) == np.float32(2 / average)
    assert more, "float32 never took one frame more, as it does in vLLM"


def test_time_is_counted_as_vllm_counts_it():
    config = read_config(GOLDEN / "model")
    rng = np.random.default_rng(0)
    in_float32 = 0
    for _ in range(400):
        t, h, w = (int(rng.integers(1, most)) for most in (385, 3, 4))
        seconds = float(np.float32(2 / (2 * t / rng.integers(2 * t, 99999) * rng.uniform(5, 60))))
        ids = torch.tensor([7, 7, *[config.video_token_id] * (t * h * w), 7])
        ours = mrope_positions(ids, [(t, 2 * h, 2 * w)], config, [seconds])
        expected = np.indices((t, h, w)).astype(np.int64)
        steps = expected[0] * (seconds * config.vision.tokens_per_second)
        expected[0] = steps.astype(np.int64)
        assert np.array_equal(ours[:, 2:-1], expected.reshape(3, -1) + 2)
        assert ours[:, -1].tolist() == [expected.max() + 3] * 3
        in_float32 += not np.array_equal(steps.astype(np.float32).astype(np.int64), expected[0])
    assert in_float32, "no case tells float64 from float32"


def test_a_video_without_seconds_is_refused():
    config = read_config(GOLDEN / "model")
    ids = torch.tensor([config.video_token_id])
    with pytest.raises(ValueError, match="a video has no second_per_grid"):
        mrope_positions(ids, [(1, 2, 2)], config)
    with pytest.raises(ValueError, match="1 images or videos have no placeholder"):
        mrope_positions(ids, [(1, 2, 2)], config, [1.0, 1.0])

"""A split holds out whole groups: nothing that is shown there is trained on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import index_of, processor, row, write_image, write_jsonl
from vlm.data.schema import Message, Sample
from vlm.data.split import choose_held_out, related, strangers

A, B, C = (Path(f"{name}.png") for name in "abc")


def sample(number: int, *images, text: str = "a question") -> Sample:
    return Sample(f"data:{number}", (Message("user", text), Message("assistant", "yes")), images)


def groups_of(*samples: Sample) -> list[int]:
    """Each sample's group, by the first sample that is in it."""
    groups = related(samples).tolist()
    return [groups.index(group) for group in groups]


def test_samples_that_show_the_same_are_one_group():
    assert groups_of(sample(0, A), sample(1, B), sample(2, A), sample(3, b"png")) == [0, 1, 0, 3]
    assert groups_of(sample(0, A), sample(1, b"png"), sample(2, b"png", B)) == [0, 1, 1]


def test_a_chain_of_samples_is_one_group():
    assert groups_of(sample(0, A), sample(1, B), sample(2, C), sample(3, C, B, A)) == [0] * 4
    assert groups_of(sample(0, A, B), sample(1, C), sample(2, B, C)) == [0, 0, 0]


def test_a_video_counts_by_its_file_or_its_frames():
    film, frames = replace(sample(0), videos=(C,)), replace(sample(1), videos=((A, B),))
    assert groups_of(film, frames, sample(2, B), sample(3, C)) == [0, 1, 1, 0]


def test_equal_texts_are_one_group_where_there_is_no_image():
    assert groups_of(sample(0), sample(1), sample(2, text="another")) == [0, 0, 2]
    assert groups_of(sample(0, A), sample(1, B), sample(2)) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_torn_and_no_source_gives_more_than_its_share(seed):
    rng = np.random.default_rng(seed)
    groups, source = rng.integers(0, 60, 300), np.sort(rng.integers(0, 3, 300))
    chosen = choose_held_out(groups, source, 0.2, seed)
    assert (np.diff(chosen) > 0).all() and len(chosen) > 30
    kept = np.setdiff1d(np.arange(300), chosen)
    assert not set(groups[chosen]) & set(groups[kept])
    assert (np.bincount(source[chosen], minlength=3) <= 0.2 * np.bincount(source)).all()
    assert np.array_equal(chosen, choose_held_out(groups, source, 0.2, seed))
    assert not np.array_equal(chosen, choose_held_out(groups, source, 0.2, seed + 1))


def test_a_group_that_is_too_large_is_trained_on():
    """Such as of a blank image that stands in many rows."""
    groups = np.array([0] * 50 + list(range(1, 51)))
    source = np.zeros(100, np.int64)
    assert len(choose_held_out(groups, source, 0.3, 0)) == 30
    assert choose_held_out(groups, source, 0.3, 0).min() >= 50
    assert not len(choose_held_out(np.zeros(9, np.int64), source[:9], 0.9, 0))


@pytest.mark.parametrize("seed", range(20))
def test_a_stranger_is_of_another_group(seed):
    groups = np.random.default_rng(seed).integers(0, 8, 40)
    others = strangers(groups)
    assert (groups[others] != groups).all()
    assert sorted(others) == list(range(40))  # each serves once
    most = np.where(np.arange(40) < 30, 3, groups)  # one group has nearly all
    assert (most[strangers(most)] != most).all()


def test_there_is_no_stranger_in_a_single_group():
    assert not len(strangers(np.zeros(5, np.int64))) and not len(strangers(np.zeros(0, np.int64)))


def test_a_selected_index_is_that_of_the_rows_alone(tmp_path):
    names = [write_image(tmp_path / f"{n}.png", 56 + 28 * n, 84, n) for n in range(4)]
    rows = [row("<image>" * (n % 3) + f"q {n}", "a " * (1 + n), names[: n % 3]) for n in range(12)]
    index, _ = index_of([write_jsonl(tmp_path / "all.jsonl", rows)], processor())
    numbers = np.array([1, 2, 5, 9, 11])
    few = [rows[number] for number in numbers]
    alone, _ = index_of([write_jsonl(tmp_path / "few.jsonl", few)], processor())
    chosen = index.select(numbers)
    for name in ("source", "length", "targets", "patches", "media", "grids"):
        assert np.array_equal(getattr(chosen, name), getattr(alone, name)), name
    assert [chosen.sample(n).messages for n in range(5)] == [
        alone.sample(n).messages for n in range(5)
    ]
    assert not len(index.select(numbers[:0])) and not len(index.select(numbers[:0]).grids)
    assert chosen.fingerprint() != index.fingerprint()

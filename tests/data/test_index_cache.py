"""The cache saves work and changes nothing: measured once, and anew where anything differs."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import index_of, processor, row, write_image, write_jsonl
from tests.data.test_index import same, write_mixed
from vlm.data import index_cache
from vlm.data.index import build_index
from vlm.data.sources import SourceSpec, open_sources


@pytest.fixture
def measured(monkeypatch):
    """Ids of the samples that were measured, by whom they were."""
    ids = []
    kind = type(processor())
    measure = kind.measure

    def counted(self, sample):
        ids.append(int(sample.id.rpartition(":")[2]))
        return measure(self, sample)

    monkeypatch.setattr(kind, "measure", counted)
    return ids


def run(file: Path, cache: Path, measured: list, ours=None, **options):
    """(index, bad entries, numbers of the lines that were measured)."""
    measured.clear()
    index, bad = index_of([file], ours or processor(), cache_dir=cache, **options)
    return index, bad, list(measured)


def chunk_starts(file: Path) -> list[int]:
    """Lines on which the chunks begin."""
    (source,) = open_sources([str(file)])
    return [chunk.places[0].line for chunk in source.chunks()]


def write_distinct(folder: Path) -> Path:
    rows = [row(f"question {number}") for number in range(600)]
    return write_jsonl(folder / "distinct.jsonl", rows)


def test_the_second_time_nothing_is_measured(tmp_path, measured):
    file, cache = write_mixed(tmp_path, 600), tmp_path / "cache"
    first, _, lines = run(file, cache, measured)
    assert len(lines) == 600
    second, bad, lines = run(file, cache, measured)
    assert same(first, second) and not bad and not lines
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


def test_appended_rows_alone_are_measured(tmp_path, measured):
    file, cache = write_distinct(tmp_path), tmp_path / "cache"
    run(file, cache, measured)
    last = chunk_starts(file)[-1]
    with file.open("ab") as stream:
        stream.write(write_jsonl(tmp_path / "more.jsonl", [row("new")] * 300).read_bytes())
    index, _, lines = run(file, cache, measured)
    assert min(lines) == last > 1, "the first chunks are whole and known"
    assert same(index, index_of([file], processor())[0])
    assert not run(file, cache, measured)[2]


def test_a_changed_row_is_measured_anew(tmp_path, measured):
    file, cache = write_distinct(tmp_path), tmp_path / "cache"
    run(file, cache, measured)
    second = chunk_starts(file)[1]
    file.write_bytes(file.read_bytes().replace(b"question 3", b"question x", 1))
    index, _, lines = run(file, cache, measured)
    assert lines == list(range(1, second))
    file.write_bytes(write_jsonl(tmp_path / "1", [row("new")]).read_bytes() + file.read_bytes())
    index, _, lines = run(file, cache, measured)
    assert lines == list(range(1, second + 1)), "a row put in moves the others, no more"
    assert same(index, index_of([file], processor())[0])


@pytest.mark.parametrize(
    "options",
    [
        {"max_pixels": 7056},
        {"max_length": 40},
        {"max_length": 40, "truncation": "right"},
        {"think": "strip_history"},
    ],
)
def test_another_setting_measures_anew_and_does_not_mix(tmp_path, measured, options):
    file, cache = write_mixed(tmp_path), tmp_path / "cache"
    first, *_ = run(file, cache, measured)
    other, bad, lines = run(file, cache, measured, processor(**options))
    assert len(lines) == 40
    fresh, expected = index_of([file], processor(**options))
    assert same(other, fresh) and bad == expected
    again, _, lines = run(file, cache, measured)
    assert same(again, first) and not lines


def test_another_tokenizer_or_system_prompt_is_another_processor():
    ours, other, named = processor(), processor(), processor()
    other.tokenizer.add_tokens(["entirely new"])
    named.default_system = "You are someone else."
    prints = [index_cache.processor_fingerprint(p) for p in (ours, processor(), other, named)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_bad_rows_are_measured_again_and_may_have_become_good(tmp_path, measured):
    """An image that was missing is there by now."""
    rows = [row("a"), row("<image>", images=["late.png"]), b"{", row("<image>b", images=["ok.png"])]
    write_image(tmp_path / "ok.png", 56, 84)
    file, cache = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "cache"
    first, bad, _ = run(file, cache, measured)
    assert first.line.tolist() == [1, 4] and [e.id for e in bad] == [f"{file}:2", f"{file}:3"]
    assert run(file, cache, measured)[1:] == (bad, [2])
    write_image(tmp_path / "late.png", 84, 112)
    index, bad, lines = run(file, cache, measured)
    assert lines == [2] and [entry.id for entry in bad] == [f"{file}:3"]
    assert same(index, index_of([file], processor())[0])
    again, _, lines = run(file, cache, measured)
    assert same(again, index) and not lines


def test_a_limit_leaves_the_rest_known(tmp_path, measured):
    file, cache = write_distinct(tmp_path), tmp_path / "cache"
    run(file, cache, measured)
    second = chunk_starts(file)[1]
    measured.clear()
    specs = [SourceSpec(str(file), limit=second + 9)]
    build_index(open_sources(specs), processor(), cache_dir=cache)
    assert measured == list(range(second, second + 10))
    assert not run(file, cache, measured)[2]


def test_chunks_that_are_gone_are_kept_up_to_a_bound(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(index_cache, "MOST_CHUNKS", 2)
    file, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    for turn in range(6):
        run(write_jsonl(file, [row(f"turn {turn}")]), cache, measured)
    (path,) = cache.iterdir()
    with np.load(path) as content:
        assert len(content["digests"]) == 3


def test_files_that_were_not_used_for_longest_go(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(index_cache, "MOST_FILES", 2)
    file, cache = write_mixed(tmp_path), tmp_path / "cache"
    for age, length in enumerate((500, 600, 700)):
        run(file, cache, measured, processor(max_length=length))
        for path in cache.iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10 * (3 - age)))
    assert len(list(cache.iterdir())) == 2
    assert not run(file, cache, measured, processor(max_length=700))[2]
    assert run(file, cache, measured, processor(max_length=500))[2]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80x"])
def test_a_damaged_file_is_ignored_and_replaced(tmp_path, measured, damage):
    file, cache = write_mixed(tmp_path), tmp_path / "cache"
    first, *_ = run(file, cache, measured)
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    index, _, lines = run(file, cache, measured)
    assert len(lines) == 40 and same(index, first)
    assert not run(file, cache, measured)[2]


def test_a_flipped_bit_is_noticed(tmp_path, measured):
    file, cache = write_mixed(tmp_path), tmp_path / "cache"
    first, *_ = run(file, cache, measured)
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(b"length.npy") + 200] ^= 1
    path.write_bytes(content)
    assert same(run(file, cache, measured)[0], first)


def test_an_image_that_was_replaced_is_measured_anew(tmp_path, measured):
    names = [write_image(tmp_path / f"{n}.png", 56, 56) for n in range(3)]
    rows = [row("text"), *(row("<image>", images=[name]) for name in names)]
    file, cache = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "cache"
    run(file, cache, measured)
    write_image(tmp_path / "1.png", 280, 280)
    index, _, lines = run(file, cache, measured)
    assert lines == [3] and index.patches.tolist() == [0, 16, 400, 16]
    (tmp_path / "1.png").write_bytes(b"no image")
    index, bad, lines = run(file, cache, measured)
    assert index.line.tolist() == [1, 2, 4] and [e.id for e in bad] == [f"{file}:3"]
    write_image(tmp_path / "1.png", 56, 56)
    index, bad, _ = run(file, cache, measured)
    assert same(index, index_of([file], processor())[0]) and not bad
    (tmp_path / "0.png").unlink()
    index, bad, _ = run(file, cache, measured)
    assert [e.id for e in bad] == [f"{file}:2"] and "does not exist" in bad[0].reason


def test_rebuild_measures_all_and_replaces(tmp_path, measured):
    file, cache = write_mixed(tmp_path), tmp_path / "cache"
    run(file, cache, measured)
    write_image(tmp_path / "0.png", 280, 280)
    index, _, lines = run(file, cache, measured, rebuild=True)
    assert len(lines) == 40
    again, _, lines = run(file, cache, measured)
    assert same(again, index) and not lines


def test_a_directory_that_cannot_be_written_is_one_warning(tmp_path, measured):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match=r"not cached.*GRAFTVL_CACHE") as warned:
        index, *_ = run(write_mixed(tmp_path), tmp_path / "cache" / "index", measured)
    assert len(index) == 40 and len(warned) == 1


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, measured):
    file, cache = write_distinct(tmp_path), tmp_path / "cache"
    ours, second = processor(), chunk_starts(file)[1]
    measure = ours.measure

    def interrupted(sample):
        if sample.id.endswith(f":{second + 9}"):
            raise KeyboardInterrupt
        return measure(sample)

    ours.measure = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(file, cache, measured, ours)
    assert run(file, cache, measured)[2][0] == second, "whole chunks are known"


def test_a_moved_file_finds_its_own_images(tmp_path, measured):
    """The same row beside another image of the same name is another sample."""
    cache, indexes = tmp_path / "cache", []
    for name, side in (("a", 56), ("b", 280)):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "x.png", side, side)
        file = write_jsonl(tmp_path / name / "d.jsonl", [row("<image>", images=["x.png"])])
        indexes.append(run(file, cache, measured)[0])
    assert [index.patches.tolist() for index in indexes] == [[16], [400]]

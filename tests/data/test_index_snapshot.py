"""Data that did not change is not read again at a start, and what changed always is."""

import json
import os
import warnings
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import index_of, processor, row, write_image, write_jsonl
from tests.data.test_index import COLUMNS
from vlm.data import index_cache, index_snapshot
from vlm.data.index import build_index
from vlm.data.loader import StepDataset, make_plan
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.source_lines import JsonSource
from vlm.data.source_tables import TableSource
from vlm.data.sources import open_sources


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files of these tests are trusted at once."""
    monkeypatch.setattr(index_snapshot, "SETTLED_NS", 0)


@pytest.fixture
def walks(monkeypatch):
    """Names of the sources whose rows were all read."""
    names = []
    for kind in (JsonSource, TableSource):

        def noted(self, chunks=kind.chunks):
            names.append(self.name)
            return chunks(self)

        monkeypatch.setattr(kind, "chunks", noted)
    return names


def start(cache: Path, walks: list, *specs, ours=None, rebuild=False, **options):
    """(index, bad entries, how many sources were walked through)."""
    walks.clear()
    sources = open_sources([str(s) if isinstance(s, Path) else s for s in specs], **options)
    index, bad = build_index(sources, ours or processor(), cache_dir=cache, rebuild=rebuild)
    return index, bad, len(walks)


def snapshots(cache: Path) -> list[Path]:
    return sorted(cache.glob("*-*.npz"))


def equal(a, b) -> bool:
    columns = [(getattr(a, name), getattr(b, name)) for name in COLUMNS]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in columns)


def ragged(folder: Path) -> list[dict]:
    """Rows with none to three images; of some an image is missing, some are malformed."""
    names = [write_image(folder / f"{n}.png", 56 + 28 * n, 84, n) for n in range(4)]
    rows = []
    for n in range(700):
        images = [*names[: n % 4], *["gone.png"] * (n % 97 == 5)]
        tags = "<image>" * (len(images) + (n % 131 == 7))
        rows.append(row(f"{tags}q {n} {'w ' * (n % 7)}", "a " * (1 + n % 5), images))
    return rows


def write(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, [*rows, b"{", *rows[:3]])
    if kind == "json":
        path.write_text(json.dumps(rows))
        return path
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        table.to_parquet(path)
    else:  # a directory with several files, whose images are inside or named
        table.save_to_disk(path, num_shards=3)
        for name in ("0.png", "1.png", "2.png", "3.png"):
            os.link(folder / name, path / name)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_unchanged_data_is_not_read_and_gives_exactly_the_same(tmp_path, walks, kind):
    cache, path = tmp_path / "cache", write(tmp_path, kind, ragged(tmp_path))
    text = write_jsonl(tmp_path / "text.jsonl", [row(f"t {n}") for n in range(30)])
    specs = [{"path": str(path), "weight": 0.5}, str(text), {"path": str(path), "name": "again"}]
    fresh, expected, _ = start(None, walks, *specs)
    first, bad, read = start(cache, walks, *specs)
    assert read == 2, "the third source is the first again"
    assert len(expected) >= 24 and {entry.found for entry in expected} == {"index"}
    second, again, read = start(cache, walks, *specs)
    assert read == 0
    for index in (first, second):
        assert equal(index, fresh) and index.fingerprint() == fresh.fingerprint()
    assert bad == again == expected
    assert second.sample(300) == fresh.sample(300)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_start_may_take_several_processes(tmp_path, walks, workers):
    cache, path = tmp_path / "cache", write(tmp_path, "jsonl", ragged(tmp_path))
    fresh, expected = index_of([path], processor(), cache_dir=cache, workers=workers)
    index, bad, read = start(cache, walks, path)
    assert equal(index, fresh) and bad == expected and not read


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(row("one more")).encode() + b"\n")


def truncated(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))


def rewritten_with_its_old_time(path: Path) -> None:
    """As `rsync --times` does, with as many bytes: only the time of the inode's change tells."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"q 9", b"x y", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize(
    "change", [appended, truncated, rewritten_with_its_old_time, replaced, Path.touch]
)
def test_a_changed_file_is_read_again(tmp_path, walks, change):
    rows = [row(f"q {n}") for n in range(90)]
    cache, path = tmp_path / "cache", write_jsonl(tmp_path / "data.jsonl", rows)
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    start(cache, walks, path, other)
    change(path)
    index, bad, read = start(cache, walks, path, other)
    assert read == 1 and walks == ["data"]
    fresh, expected, _ = start(None, walks, path, other)
    assert equal(index, fresh) and bad == expected
    assert start(cache, walks, path, other)[2] == 0


def test_a_changed_file_of_a_directory_is_noticed(tmp_path, walks):
    cache, path = tmp_path / "cache", write(tmp_path, "saved", ragged(tmp_path))
    (source,) = open_sources([str(path)])
    assert len(source.stored) == 3
    start(cache, walks, path)
    os.utime(source.stored[1])
    assert start(cache, walks, path)[2] == 1


def test_rows_that_lie_in_memory_have_no_snapshot(tmp_path, walks, monkeypatch):
    datasets = pytest.importorskip("datasets")
    cache, path = tmp_path / "cache", write(tmp_path, "parquet", ragged(tmp_path))
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**30)
    assert start(cache, walks, path)[2] == start(cache, walks, path)[2] == 1
    assert not snapshots(cache)


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "pickle": lambda content: b"\x80x",
    "bit": lambda content: flipped(content, content.index(b"length.npy") + 200),
}


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_snapshot_is_none_and_is_replaced(tmp_path, walks, damage):
    cache, path = tmp_path / "cache", write(tmp_path, "jsonl", ragged(tmp_path))
    first, expected, _ = start(cache, walks, path)
    (snapshot,) = snapshots(cache)
    snapshot.write_bytes(DAMAGE[damage](snapshot.read_bytes()))
    index, bad, read = start(cache, walks, path)
    assert read == 1 and equal(index, first) and bad == expected
    assert start(cache, walks, path)[2] == 0


def test_another_limit_directory_option_or_processor_is_another_snapshot(tmp_path, walks):
    (tmp_path / "root").mkdir()
    for folder, side in ((tmp_path, 56), (tmp_path / "root", 280)):
        write_image(folder / "x.png", side, side)
    rows = [row(f"<image>{n}", images=["x.png"]) for n in range(40)]
    cache, path = tmp_path / "cache", str(write_jsonl(tmp_path / "data.jsonl", rows))
    settings = [
        ({"path": path}, {}),
        ({"path": path, "limit": 7}, {}),
        ({"path": path, "limit": 9}, {}),
        ({"path": path, "media_root": str(tmp_path / "root")}, {}),
        ({"path": path}, {"allow_urls": True}),
        ({"path": path}, {"ours": processor(max_length=60)}),
    ]
    for turn in (1, 0):
        for spec, options in settings:
            index, bad, read = start(cache, walks, spec, **options)
            fresh, expected, _ = start(None, walks, spec, **options)
            assert read == turn and equal(index, fresh) and bad == expected
    assert len(snapshots(cache)) == len(settings)


def test_bad_rows_alone_are_looked_at_and_may_have_become_good(tmp_path, walks):
    rows = [row("a"), row("<image>", images=["late.png"]), row("b")]
    cache, path = tmp_path / "cache", write_jsonl(tmp_path / "data.jsonl", rows)
    _, bad, _ = start(cache, walks, path)
    assert "does not exist" in bad[0].reason and start(cache, walks, path)[1:] == (bad, 0)
    (tmp_path / "late.png").write_bytes(b"no image")
    _, bad, read = start(cache, walks, path)
    assert "does not exist" not in bad[0].reason and read == 1
    assert start(cache, walks, path)[1:] == (bad, 0), "with the new reason"
    write_image(tmp_path / "late.png", 56, 84)
    index, bad, read = start(cache, walks, path)
    assert index.line.tolist() == [1, 2, 3] and not bad and read == 1


@pytest.mark.parametrize("backdated", [False, True])
def test_a_file_that_has_just_changed_is_not_trusted_yet(tmp_path, walks, monkeypatch, backdated):
    """It may change again without another time."""
    monkeypatch.setattr(index_snapshot, "SETTLED_NS", 10**12)
    cache, path = tmp_path / "cache", write_jsonl(tmp_path / "data.jsonl", [row("a")])
    if backdated:
        os.utime(path, (0, 0))
    start(cache, walks, path)
    assert start(cache, walks, path)[2] == 1 and not snapshots(cache)
    monkeypatch.setattr(index_snapshot, "SETTLED_NS", 0)
    assert start(cache, walks, path)[2] == 1 and len(snapshots(cache)) == 1
    assert start(cache, walks, path)[2] == 0


def test_a_file_that_changes_while_it_is_measured_is_not_trusted(tmp_path, walks, monkeypatch):
    cache, path = tmp_path / "cache", write_jsonl(tmp_path / "data.jsonl", [row("a"), row("b")])
    ours = processor()
    measure = ours.measure

    def changed(sample):
        appended(path)
        return measure(sample)

    monkeypatch.setattr(ours, "measure", changed)
    start(cache, walks, path, ours=ours)
    assert not snapshots(cache)


def with_images(folder: Path, count: int) -> Path:
    for number in range(count):
        write_image(folder / f"{number}.png", 56, 56)
    rows = [row(f"<image>{n}", images=[f"{n}.png"]) for n in range(count)]
    return write_jsonl(folder / "data.jsonl", rows)


def test_an_image_replaced_among_many_is_found_when_its_data_is_read_again(
    tmp_path, walks, monkeypatch
):
    monkeypatch.setattr(index_snapshot, "SAMPLED", 10)
    cache, path = tmp_path / "cache", with_images(tmp_path, 40)
    first, *_ = start(cache, walks, path)
    write_image(tmp_path / "2.png", 280, 280)
    index, _, read = start(cache, walks, path)
    assert read == 0 and equal(index, first)
    path.touch()
    index, _, read = start(cache, walks, path)
    assert read == 1 and index.patches[2] == 400
    write_image(tmp_path / "1.png", 280, 280)
    assert start(cache, walks, path)[0].patches[1] == 16
    index, _, read = start(cache, walks, path, rebuild=True)
    assert read == 1 and index.patches[1] == 400
    index, _, read = start(cache, walks, path)
    assert read == 0 and index.patches[1] == 400


@pytest.mark.parametrize("change", ["another", "removed"])
def test_many_replaced_images_are_found_at_the_start(tmp_path, walks, monkeypatch, change):
    monkeypatch.setattr(index_snapshot, "SAMPLED", 10)
    cache, path = tmp_path / "cache", with_images(tmp_path, 40)
    start(cache, walks, path)
    for number in range(8, 16):
        (tmp_path / f"{number}.png").unlink()
        if change == "another":
            write_image(tmp_path / f"{number}.png", 280, 280)
    index, bad, read = start(cache, walks, path)
    fresh, expected, _ = start(None, walks, path)
    assert read == 1 and equal(index, fresh) and bad == expected
    assert len(bad) == 8 * (change == "removed")


def test_a_replaced_image_that_no_start_found_is_left_out_by_the_loader(
    tmp_path, walks, monkeypatch
):
    """Of another grid, it would break the budget; of the same grid, it trains."""
    monkeypatch.setattr(index_snapshot, "SAMPLED", 1)
    cache, path = tmp_path / "cache", with_images(tmp_path, 12)
    start(cache, walks, path)
    write_image(tmp_path / "5.png", 280, 280)
    write_image(tmp_path / "7.png", 57, 58, seed=7)

    def step():
        index, bad, _ = start(cache, walks, path)
        assert not bad
        plan = make_plan(index, index.length.astype(float), 12, 42, 1, Budget())
        return StepDataset(index, processor(), plan, 0)[Position(0, 0)]

    found = step()
    (bad,) = found.bad
    assert bad.id == f"{path}:6" and "vlm.data.index --rebuild" in bad.reason
    assert found.samples == 11 and f"{path}:8" in found.ids
    assert found.targets == sum(len(batch.targets) for batch in found.micro_batches) > 0
    start(cache, walks, path, rebuild=True)
    found = step()
    assert found.samples == 12 and not found.bad


def test_a_snapshot_in_use_keeps_its_chunks_from_being_removed(tmp_path, walks, monkeypatch):
    monkeypatch.setattr(index_cache, "MOST_FILES", 4)
    cache, used = tmp_path / "cache", write_jsonl(tmp_path / "used.jsonl", [row("a")])
    start(cache, walks, used)
    mine = set(cache.iterdir())
    for number in range(3):
        for path in cache.iterdir():
            os.utime(path, (0, path.stat().st_mtime - 100))
        start(cache, walks, used)
        start(cache, walks, write_jsonl(tmp_path / f"{number}.jsonl", [row("b")]))
    assert mine < set(cache.iterdir()) and len(list(cache.iterdir())) == 4


def _starts(cache: Path, path: Path) -> list[str]:
    warnings.simplefilter("error")  # this process's own
    found = []
    for turn in range(6):
        if turn % 2:
            path.touch()
        index, bad = index_of([path], processor(), cache_dir=cache)
        found.append(f"{index.fingerprint()} {bad}")
    return found


def test_several_runs_at_once_neither_fail_nor_differ(tmp_path):
    cache, path = tmp_path / "cache", write(tmp_path, "jsonl", ragged(tmp_path))
    index, bad = index_of([path], processor())
    with get_context("fork").Pool(4) as pool:
        found = pool.starmap(_starts, [(cache, path)] * 4)
    assert {text for texts in found for text in texts} == {f"{index.fingerprint()} {bad}"}
    assert not list(cache.glob("*.partial"))

"""The streaming writer: bytes, shards, dtypes, locks, disk space and what a killed write left."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.checkpoint import TensorReader
from vlm.shards import CHUNK, Entry, plan_shards, write_checkpoint
from vlm.tensor_file import DTYPES, NAMES, CheckpointError, Stored, read_header

ROOT = Path(__file__).parents[2]


def nothing(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def write(out, entries, limit=10**9, **options):
    write_checkpoint(out, plan_shards(entries, limit), nothing, **options)
    return out


def random(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


ODD = {
    "b": random((7, 3), torch.bfloat16),
    "a": random((CHUNK // 2 + 5, 3)),  # several chunks, the last one short
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "transposed": random((4, 6)).t(),
    "long": torch.arange(9),
}


def test_the_library_reads_what_is_written_from_memory_and_from_files(tmp_path):
    write(tmp_path / "one", [Entry.of(*item) for item in ODD.items()])
    reader = TensorReader(tmp_path / "one")
    again = write(tmp_path / "two", [reader.entry(name) for name in ODD])
    for folder in (tmp_path / "one", again):
        held = load_file(folder / "model.safetensors")
        assert set(held) == set(ODD)
        for name, tensor in ODD.items():
            assert held[name].dtype == tensor.dtype and torch.equal(held[name], tensor)
    files = [folder / "model.safetensors" for folder in (tmp_path / "one", again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    # mapped files need each value at a multiple of its size
    for stored in read_header(files[0]).values():
        assert stored.offset % DTYPES[stored.dtype].itemsize == 0


@pytest.mark.parametrize("source", ["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_converted_as_torch_does(tmp_path, source, dtype):
    tensor = random((CHUNK // 4 + 3, 2), torch.float32)
    entry = Entry("t", NAMES[dtype], tuple(tensor.shape), (tensor,))
    if source == "file":
        reader = TensorReader(write(tmp_path / "source", [Entry.of("t", tensor)]))
        entry = reader.entry("t", NAMES[dtype])
    held = load_file(write(tmp_path / "out", [entry]) / "model.safetensors")["t"]
    assert held.dtype == dtype and torch.equal(held, tensor.to(dtype))


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path):
    tensor = torch.tensor([1.0, 70000.0])
    with pytest.raises(CheckpointError, match=r"w has a value of 7e\+04, too large for F16"):
        write(tmp_path / "out", [Entry("w", "F16", (2,), (tensor,))])
    assert not (tmp_path / "out.partial").exists()  # the same command could never finish it
    beside = torch.tensor([float("inf"), 70000.0])
    with pytest.raises(CheckpointError, match=r"7e\+04, too large"):
        write(tmp_path / "out", [Entry("w", "F16", (2,), (beside,))])
    infinite = torch.tensor([1.0, float("inf")])  # the donor's own: kept
    held = load_file(
        write(tmp_path / "out", [Entry("w", "F16", (2,), (infinite,))]) / "model.safetensors"
    )
    assert torch.equal(held["w"], infinite.half())


def test_rows_from_a_file_and_from_memory_make_one_tensor(tmp_path):
    old, new = random((5, 4)), random((2, 4), seed=1)
    reader = TensorReader(write(tmp_path / "source", [Entry.of("t", old)]))
    write(tmp_path / "out", [Entry("t", "F32", (7, 4), (reader.stored("t"), new))])
    held = TensorReader(tmp_path / "out")
    assert torch.equal(held.get("t"), torch.cat([old, new]))
    assert torch.equal(held.rows("t", 4, 6), torch.stack([old[4], new[0]]))


def test_a_tensor_larger_than_the_limit_has_a_shard_of_its_own(tmp_path):
    sizes = {"a": 10, "b": 100, "c": 10, "d": 10, "e": 21}
    tensors = {name: random((size,)) for name, size in sizes.items()}
    out = write(tmp_path / "out", [Entry.of(*item) for item in tensors.items()], limit=41 * 4)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    groups = {}
    for name, file in index["weight_map"].items():
        groups.setdefault(file, []).append(name)
    assert groups == {
        f"model-{number:05d}-of-00003.safetensors": names
        for number, names in enumerate((["a"], ["b"], ["c", "d", "e"]), start=1)
    }
    assert index["metadata"] == {"total_size": 4 * sum(sizes.values())}
    assert TensorReader(out).names() == sorted(sizes)


def test_no_name_is_written_twice_and_no_part_left_out():
    entry = Entry.of("t", torch.zeros(2))
    with pytest.raises(CheckpointError, match="t would be written twice"):
        plan_shards([entry, entry], 10**9)
    with pytest.raises(ValueError, match=r"t: 2 values for the shape \[3\]"):
        Entry("t", "F32", (3,), (torch.zeros(2),))


def test_too_little_space_is_told_before_anything_is_written(tmp_path):
    shape = (1 << 44,)  # 70 TB; the file is never opened
    entry = Entry("t", "F32", shape, (Stored(tmp_path / "huge", 0, "F32", shape),))
    with pytest.raises(CheckpointError, match=r"takes 70368\.74 GB more and \d+\.\d\d GB are free"):
        write(tmp_path / "out", [entry])
    assert not list(tmp_path.iterdir())


def test_one_writer_at_a_time(tmp_path):
    out = tmp_path / "out"
    with (tmp_path / "out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="out is being written by another process"):
            write(out, [Entry.of("t", torch.zeros(2))])
    write(out, [Entry.of("t", torch.zeros(2))])  # a lock that nobody holds keeps nobody out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def a_folder(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def a_file(path):
    path.write_text("mine")


@pytest.mark.parametrize("suffix", ["partial", "old"])
@pytest.mark.parametrize("make", [a_folder, a_file])
def test_what_is_not_ours_is_never_removed(tmp_path, suffix, make):
    mine = tmp_path / f"out.{suffix}"
    make(mine)
    with pytest.raises(CheckpointError, match=f"out.{suffix} is in the way"):
        write(tmp_path / "out", [Entry.of("t", torch.zeros(2))])
    assert (mine / "thesis.txt" if mine.is_dir() else mine).read_text() == "mine"


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    target = write(tmp_path / "target", [Entry.of("t", torch.zeros(2))])
    (tmp_path / "out").symlink_to(target)
    write(tmp_path / "out", [Entry.of("t", torch.ones(2))])
    assert torch.equal(TensorReader(target).get("t"), torch.zeros(2))
    assert torch.equal(TensorReader(tmp_path / "out").get("t"), torch.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]


def test_a_file_that_bears_the_locks_name_stays(tmp_path):
    (tmp_path / "out.lock").write_text("mine")
    write(tmp_path / "out", [Entry.of("t", torch.zeros(2))])
    assert (tmp_path / "out.lock").read_text() == "mine"


def test_values_that_become_zero_are_counted(tmp_path):
    tensor = torch.tensor([1.0, 1e-9, 0.0, -1e-9])
    shards = plan_shards([Entry("w", "F16", (4,), (tensor,))], 10**9)
    assert write_checkpoint(tmp_path / "out", shards, nothing) == 2


class Stop(Exception):
    pass


def interrupted(out, entries, fingerprint):
    """A write that is stopped when all shards are there; their times."""

    def stop(folder):
        raise Stop

    with pytest.raises(Stop):
        write_checkpoint(out, plan_shards(entries, 100), stop, fingerprint)
    partial = out.with_name("out.partial")
    return times(partial)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_finished_shards_are_used_again_by_the_same_plan_alone(tmp_path):
    entries = [Entry.of(name, random((20,), seed=ord(name))) for name in "abc"]
    reference = write(tmp_path / "reference", entries, 100)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    held = interrupted(out, entries, "plan 1")
    assert len(held) == 3
    torn = partial / "model-00002-of-00003.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    (partial / "stray").mkdir()
    write(out, entries, 100, fingerprint="plan 1")
    for path in reference.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in reference.iterdir())
    kept = {name for name, time in times(out).items() if held[name] == time}
    assert kept == {"model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"}

    shutil.rmtree(out)
    other = [Entry.of(name, random((20,), seed=7)) for name in "abc"]
    interrupted(out, entries, "plan 1")
    write(out, other, 100, fingerprint="plan 2")  # same names and sizes
    assert torch.equal(TensorReader(out).get("b"), random((20,), seed=7))
    shutil.rmtree(out)
    interrupted(out, entries, "plan 1")
    write(out, other, 100)  # values in memory have no fingerprint
    assert torch.equal(TensorReader(out).get("b"), random((20,), seed=7))


def test_an_old_checkpoint_stays_until_the_new_one_is_whole(tmp_path):
    out = write(tmp_path / "out", [Entry.of("t", torch.zeros(2))])
    interrupted(out, [Entry.of("t", torch.ones(2))], None)
    assert torch.equal(TensorReader(out).get("t"), torch.zeros(2))
    write(out, [Entry.of("t", torch.ones(2))])
    assert torch.equal(TensorReader(out).get("t"), torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


COPY = """
import resource, sys
from pathlib import Path
from vlm.checkpoint import TensorReader
from vlm.shards import plan_shards, write_checkpoint
reader = TensorReader(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shards = plan_shards([reader.entry("t", sys.argv[3])], 10**9)
write_checkpoint(Path(sys.argv[2]), shards, lambda folder: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_tensor_of_300_mb_takes_no_memory(tmp_path, dtype):
    source = tmp_path / "source"
    source.mkdir()
    (shard,) = plan_shards(
        [Entry("t", "BF16", (1, 150_000_000), (torch.zeros(1).expand(150_000_000),))], 1
    )
    with (source / "model.safetensors").open("wb") as file:  # a hole
        file.write(shard.header)
        file.truncate(shard.size)
    command = [sys.executable, "-c", COPY, source, tmp_path / "out", dtype]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 40_000  # kilobytes
    assert TensorReader(tmp_path / "out").shape("t") == (1, 150_000_000)

"""Checkpoints written as a stream: bytes pass from file to file by the chunk, never a model.

    OUT.lock              held while one process writes
    OUT.partial/          becomes OUT when all is there
      plan                the fingerprint of what is being written
      *.safetensors.part  the shard at hand
      *.safetensors       finished shards, which the same plan uses again

A killed write leaves the old OUT, or none, beside OUT.partial. What is written depends on the
entries alone, so that a resumed checkpoint is byte for byte the uninterrupted one.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vlm.partial import PART, PLAN, check_ours, only_writer, partial_of, put_in_place, remove, sync
from vlm.tensor_file import DTYPES, NAMES, CheckpointError, Stored, make_header, nbytes, read_into

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 4_000_000_000
"""Below the 5 GB from which on hubs and file systems make trouble."""
CHUNK = 1 << 20
"""Bytes; larger ones fall out of the processor's cache between reading and writing."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        dtype: of what is written, as safetensors name it; parts of another are converted.
        parts: tensors in files or in memory that lie one after another in it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Stored | Tensor, ...]

    def __post_init__(self) -> None:
        held = sum(prod(part.shape) for part in self.parts)
        if held != prod(self.shape):
            raise ValueError(f"{self.name}: {held} values for the shape {list(self.shape)}")

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        """A tensor in memory as it is."""
        return cls(name, NAMES[tensor.dtype], tuple(tensor.shape), (tensor.detach(),))

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """A weight file: its name, its first bytes and what follows them."""

    file: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


def plan_shards(entries: Sequence[Entry], max_shard_bytes: int) -> list[Shard]:
    """Entries in their order, as many to a file as fit; a larger tensor has one of its own.

    Raises CheckpointError where a name is there twice.
    """
    seen: set[str] = set()
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if entry.name in seen:
            raise CheckpointError(f"{entry.name} would be written twice")
        seen.add(entry.name)
        if groups[-1] and size + entry.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    count = len(groups)
    shards = []
    for number, group in enumerate(groups, start=1):
        file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        # wide values first, or a mapped file would hold values off their alignment
        ordered = sorted(group, key=lambda entry: -DTYPES[entry.dtype].itemsize)
        header = make_header([(entry.name, entry.dtype, entry.shape) for entry in ordered])
        shards.append(Shard(file, header, tuple(ordered)))
    return shards


def write_checkpoint(
    out_dir: Path,
    shards: Sequence[Shard],
    finish: Callable[[Path], None],
    fingerprint: str | None = None,
    label: str | None = None,
) -> int:
    """Write weights and their index, let `finish` add the rest, then rename the folder whole.

    Args:
        out_dir: replaced if it is there.
        finish: given the unfinished folder once all weights are in it; adds `config.json` and
            whatever else belongs to the checkpoint.
        fingerprint: of all that the weights depend on; finished shards that a killed write with
            the same fingerprint left are used again. Without one it starts from nothing.
        label: of the progress bar, which only a terminal sees; None for no bar.

    Returns:
        How many values of what was written now are not zero but became so in their dtype.

    Raises:
        CheckpointError: too little space, another process writes the same checkpoint, something
            else has OUT.partial's name or OUT.old's, a donor file ends too early, or a value does
            not fit into the dtype. The last two leave nothing, for no other run could go on.
        OSError: the folder cannot be written.
    """
    out_dir = Path(out_dir)
    partial = partial_of(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(out_dir):
        check_ours(out_dir)
        finished = _finished(partial, shards, fingerprint)
        _check_space(out_dir, shards, finished)
        _prepare(partial, finished, fingerprint)
        total = sum(shard.size for shard in shards)
        from tqdm import tqdm  # here: nothing that reads a model or builds one needs it

        bar = tqdm(
            desc=label,
            total=total,
            initial=sum(shard.size for shard in shards if shard.file in finished),
            unit="B",
            unit_scale=True,
            disable=None if label else True,
        )
        zeroed = 0
        try:
            with bar:
                for shard in shards:
                    if shard.file not in finished:
                        zeroed += _write_shard(partial, shard, bar.update)
        except CheckpointError:
            remove(partial)
            raise
        if len(shards) > 1:
            _write_index(partial / INDEX, shards)
        finish(partial)
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        (partial / PLAN).unlink()
        put_in_place(out_dir)
    return zeroed


def _finished(partial: Path, shards: Sequence[Shard], fingerprint: str | None) -> set[str]:
    """Files of the shards that a killed write with this fingerprint left whole."""
    plan = partial / PLAN
    if fingerprint is None or not plan.is_file() or plan.read_bytes() != fingerprint.encode():
        return set()
    sizes = {shard.file: shard.size for shard in shards}
    return {
        path.name
        for path in partial.iterdir()
        if path.name in sizes and path.stat().st_size == sizes[path.name]
    }


def _check_space(out_dir: Path, shards: Sequence[Shard], finished: set[str]) -> None:
    needed = sum(shard.size for shard in shards if shard.file not in finished)
    free = shutil.disk_usage(out_dir.parent).free
    if needed > free:
        raise CheckpointError(
            f"{out_dir} takes {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free on its "
            "disk; make room or choose another place"
        )


def _prepare(partial: Path, finished: set[str], fingerprint: str | None) -> None:
    """Leave nothing in the folder but finished shards and the plan that they belong to."""
    partial.mkdir(exist_ok=True)
    for path in partial.iterdir():
        if path.name not in {*finished, PLAN}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not finished:
        (partial / PLAN).write_text(fingerprint or "", encoding="utf-8")
        sync(partial / PLAN)
        sync(partial)


def _write_shard(folder: Path, shard: Shard, advance: Callable[[int], object]) -> int:
    """How many of its values became zero."""
    zeroed = 0
    part = folder / (shard.file + PART)
    with part.open("wb", buffering=0) as file:
        _write(file, shard.header)
        advance(len(shard.header))
        for entry in shard.entries:
            for piece in entry.parts:
                for data, lost in _chunks(entry, piece):
                    zeroed += lost
                    _write(file, data)
                    advance(len(data))
        os.fsync(file.fileno())
    os.replace(part, folder / shard.file)
    sync(folder)
    return zeroed


def _chunks(entry: Entry, part: Stored | Tensor) -> Iterator[tuple[memoryview, int]]:
    """The bytes of a part of an entry, in its dtype, and how many values became zero.

    A chunk is valid until the next.
    """
    if isinstance(part, Stored) and part.dtype == entry.dtype:
        yield from ((data, 0) for data in _file_chunks(part))
        return
    dtype, count = DTYPES[entry.dtype], prod(part.shape)
    flat = part.reshape(-1) if isinstance(part, Tensor) else None
    step = CHUNK // dtype.itemsize
    for start in range(0, count, step):
        stop = min(start + step, count)
        held = part.values(start, stop) if flat is None else flat[start:stop].cpu()
        values = held.to(dtype).contiguous()
        lost = 0
        if held.dtype != dtype:
            overflown = held[values.isinf() & ~held.isinf()]
            if len(overflown):
                raise CheckpointError(
                    f"{entry.name} has a value of {overflown.abs().max().item():.3g}, too large "
                    f"for {entry.dtype}; choose another dtype"
                )
            lost = int(((values == 0) & (held != 0)).sum())
        yield memoryview(values.view(torch.uint8).numpy()), lost


def _file_chunks(stored: Stored) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, stored.nbytes)))
    with open(stored.path, "rb", buffering=0) as file:
        file.seek(stored.offset)
        for start in range(0, stored.nbytes, CHUNK):
            data = buffer[: stored.nbytes - start]
            read_into(file, data)
            yield data


def _write(file, data: bytes | memoryview) -> None:
    """All of it: a raw file may take a part only."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def _write_index(path: Path, shards: Sequence[Shard]) -> None:
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

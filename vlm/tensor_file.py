"""The safetensors format: where each tensor of a file lies, read and checked without its values.

A file is 8 bytes (little-endian length of the header), the header (a JSON object: name -> dtype,
shape and begin and end of its bytes) and the tensors' bytes, one after another without holes
(https://github.com/huggingface/safetensors#format). The header is read here, rather than by the
library, because a copier needs the offsets, and because a bad file gets an error that says how.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

MAX_HEADER = 100_000_000
"""Bytes; the library's own bound."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""The format's names of dtypes -> torch's."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit its config."""


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file."""

    path: Path
    offset: int
    """Of its first byte in the file."""
    dtype: str
    """As the format names it."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start to stop of the flattened tensor; (stop - start,), memory of its own."""
        count = (prod(self.shape) if stop is None else stop) - start
        values = torch.empty(count, dtype=DTYPES[self.dtype])
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * values.element_size())
            read_into(file, memoryview(values.view(torch.uint8).numpy()))
        return values


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * DTYPES[dtype].itemsize


def read_into(file, buffer: memoryview) -> None:
    """Fill a buffer from a file without one of its own; CheckpointError where the file ends."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise CheckpointError(f"{file.name} ends too early; download it again")
        done += count


def read_header(path: Path) -> dict[str, Stored]:
    """Where the tensors of a file lie, in the header's order.

    Raises:
        CheckpointError: the file is missing, shorter or longer than its header says, has no
            header that makes sense, or a dtype that torch lacks.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(MAX_HEADER, size - 8) else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if text == b"" and _is_lfs_pointer(path, size):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`")
    if not text:
        what = f"{size} bytes and no safetensors header in them"
        raise CheckpointError(f"{path} is damaged ({what}); download it again")
    try:
        header = json.loads(text, object_pairs_hook=each_once)
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, 8 + length, name, row) for name, row in header.items()}
        end = _check_contiguous(tensors, 8 + length)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged (its header makes no sense: {error!r:.150}); download it again"
        ) from None
    if size != end:
        how = "truncated" if size < end else "damaged"
        raise CheckpointError(
            f"{path} is {how}: it has {size} bytes and its header says {end}; download it again"
        )
    return tensors


def _is_lfs_pointer(path: Path, size: int) -> bool:
    return size < 1000 and path.read_bytes().startswith(b"version https://git-lfs")


def each_once(pairs: list[tuple[str, object]]) -> dict:
    """For json's object_pairs_hook, which else lets the last of two equal keys win."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is there twice")
    return content


def _entry(path: Path, data: int, name: str, row: dict) -> Stored:
    begin, end = row["data_offsets"]
    shape = tuple(row["shape"])
    if row["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path} holds {name} as {row['dtype']}, as quantised models do; give the unquantised "
            "one"
        )
    if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
        raise ValueError(f"shape {shape}, bytes {begin} to {end}")
    stored = Stored(path, data + begin, row["dtype"], shape)
    if stored.nbytes != end - begin:
        raise ValueError(f"{row['dtype']} {list(shape)} in {end - begin} bytes")
    return stored


def _check_contiguous(tensors: dict[str, Stored], data: int) -> int:
    """The end of the last tensor; ValueError where two overlap or bytes belong to none."""
    end = data
    for stored in sorted(tensors.values(), key=lambda stored: (stored.offset, stored.nbytes)):
        if stored.offset != end:
            raise ValueError(f"bytes {end} to {stored.offset} belong to two tensors or to none")
        end += stored.nbytes
    return end


def make_header(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> bytes:
    """The first bytes of a file of (name, dtype, shape) in this order, padded to 8."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

"""Whether a checkpoint's files are as they were written: `checksums.json`, the last one of them."""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from vlm.tensor_file import CheckpointError

CHECKSUMS = "checksums.json"
"""File -> [bytes, CRC-32]."""
CHUNK = 1 << 22
"""Bytes read at once."""


def checksum(path: Path) -> list[int]:
    """Its bytes, and their CRC-32 (which here takes a tenth of the time of a SHA)."""
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, list[int]]:
    """Of files somewhere in the folder."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def read_checksums(folder: Path) -> dict[str, list[int]]:
    """CheckpointError where the folder has none that make sense."""
    try:
        held = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return {name: [int(size), int(crc)] for name, (size, crc) in held.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{CHECKSUMS} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{CHECKSUMS} cannot be read: {error}") from None


def flaw(folder: Path, name: str, written: list[int]) -> str | None:
    """Why a file is not what was written, or None."""
    try:
        found = checksum(folder / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if found[0] != written[0]:
        return f"{name} has {found[0]} bytes, {written[0]} were written"
    return None if found == written else f"{name} has other bytes than were written"

"""The disk that a run lies on: whether it has room, and small files that are written whole."""

import os
import shutil
from collections.abc import Iterable
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from train.config import UsageError
from vlm.partial import sync

FULL = (ENOSPC, EDQUOT, EFBIG)
"""Errors of a disk or a quota that holds no more."""


def check_room(folder: Path, needed: float) -> None:
    """UsageError where the folder's disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"a checkpoint takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free on the "
            f"disk of {folder}; make room"
        )


def write_text(path: Path, text: str) -> None:
    """`write_lines` of a text that has no line end at its end."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A small file, whole or as it was before; on the disk at return."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)

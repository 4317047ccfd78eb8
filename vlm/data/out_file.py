"""The file that a command writes: refused before the work, and there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def check_out(flag: str, path: Path) -> None:
    """ValueError where no file of this name can be written.

    Args:
        flag: what gave the name, for the error.
    """
    if not path.name or path.is_dir():
        raise ValueError(f"--{flag} {path} is a directory; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"--{flag} {path}: there is no directory {path.parent}; make it first")


@contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """The file's text to be; an error or Ctrl-C leaves nothing behind.

    Names of files that are no text are written with backslashes, as `\\udcff`.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

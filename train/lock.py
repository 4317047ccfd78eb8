"""One run at a time in a directory: its file `.lock`, which says whose it is."""

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import TextIO

from train.config import UsageError

LOCK = ".lock"


def lock(folder: Path) -> tuple[TextIO, str]:
    """Hold the folder's lock until the file is closed, or this process ends in whatever way.

    By fcntl, not flock: a data worker, being forked, would hold that one on after its parent's
    death. The price: this process must not open the file again, since closing it lets go.

    Returns:
        The file, and what `owner` now says.

    Raises:
        UsageError: another process holds it; OSError: the folder cannot be written.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either means that it is held
        file.close()
        raise UsageError(
            f"{folder} is in use by another run ({owner(folder)}); wait for its end, or give "
            "another output_dir"
        ) from None
    except OSError:
        pass  # a file system without locks: as good as it gets
    file.truncate(0)
    mine = f"process {os.getpid()} on {gethostname()}, since {datetime.now(UTC)}"
    file.write(mine)
    file.flush()
    os.fsync(file.fileno())  # other machines read it
    return file, mine


def owner(folder: Path) -> str:
    """Who took the lock last, in words that no other process and no other time has; not to be
    asked by the one that holds it."""
    try:
        return (folder / LOCK).read_text(encoding="utf-8")
    except OSError:
        return ""

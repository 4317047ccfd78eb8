"""The names beside a checkpoint while it is written: OUT.lock, OUT.partial and OUT.old.

What bears such a name and is not ours is somebody's work: it is refused, never removed.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.hf_config import ConfigError
from vlm.tensor_file import CheckpointError

PLAN = "plan"
PART = ".part"
WEIGHTS = (".safetensors", f".safetensors{PART}")


def partial_of(out_dir: Path) -> Path:
    return out_dir.with_name(out_dir.name + ".partial")


def old_of(out_dir: Path) -> Path:
    """What was there before, until the new one is in its place."""
    return out_dir.with_name(out_dir.name + ".old")


def check_new(out_dir: Path) -> None:
    """Raise ConfigError where something has this name, or nothing can."""
    if os.path.lexists(out_dir):  # a dangling link is there, too
        raise ConfigError(f"{out_dir} exists; remove it or choose another --out")
    try:
        os.lstat(partial_of(out_dir))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"{out_dir} cannot be written ({reason}); choose another --out") from None


def check_ours(out_dir: Path) -> None:
    """Raise CheckpointError where OUT.partial or OUT.old is no checkpoint, whole or begun."""
    for path in (partial_of(out_dir), old_of(out_dir)):
        if os.path.lexists(path) and not _is_ours(path):
            raise CheckpointError(
                f"{path} is in the way and no checkpoint that was begun here; move it, or choose "
                "another name"
            )


def _is_ours(path: Path) -> bool:
    """A folder with our plan or weights in it, or just made."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = [held.name for held in path.iterdir()]
    return not names or PLAN in names or any(name.endswith(WEIGHTS) for name in names)


@contextmanager
def only_writer(out_dir: Path) -> Iterator[None]:
    """Hold OUT.lock, which the next process takes over from one that was killed."""
    path = out_dir.with_name(out_dir.name + ".lock")
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise CheckpointError(
                f"{out_dir} is being written by another process; wait for it, or choose another "
                "name"
            ) from None
        except OSError:
            pass  # a file system without locks: as good as it gets
        # its last holder removed it between open and flock: ours would keep nobody out
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    with file:
        try:
            yield
        finally:
            if os.fstat(file.fileno()).st_size == 0:  # ours never holds anything
                path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A folder's weights go last: killed in between, it is still known for ours."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    for held in sorted(path.iterdir(), key=lambda held: held.name.endswith(WEIGHTS)):
        remove(held)
    path.rmdir()


def put_in_place(out_dir: Path) -> None:
    """OUT.partial becomes OUT; what had that name goes."""
    old = old_of(out_dir)
    if out_dir.exists():
        if os.path.lexists(old):  # of a write killed in between
            remove(old)
        os.replace(out_dir, old)
    os.replace(partial_of(out_dir), out_dir)
    sync(out_dir.parent)
    if os.path.lexists(old):
        remove(old)


def sync(path: Path) -> None:
    """To the disk, so that a rename never outlives what it names in a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

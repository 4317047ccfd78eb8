"""What a hybrid was made of: hashes of the donors for its report, a fingerprint for resuming."""

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from vlm.checkpoint import TensorReader
from vlm.shards import CHUNK, Shard
from vlm.tensor_file import Stored

SHA256 = re.compile(r"[0-9a-f]{64}")


class Stopped(Exception):
    """The hashing was called off."""


class Identities:
    """The donors' identities, found in a thread beside the copying.

    A file that gave a tensor is hashed whole, in the order in which the copier reads the same
    bytes. Of the others, such as an old language model's, the size is told. Leaving the context
    calls the thread off.

    Args:
        donors: by `vision` and `llm`.
        shards: what is written from them.
    """

    def __init__(self, donors: dict[str, TensorReader], shards: Sequence[Shard]) -> None:
        self._donors, self._used = donors, _files_read(shards)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "hash")
        self._found: Future[dict[str, dict]] | None = None

    def __enter__(self) -> "Identities":
        self._found = self._pool.submit(self._find)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def result(self) -> dict[str, dict]:
        """By donor: path, config_sha256 and files: name -> size and, where it was read, sha256.

        Waits for the thread; raises OSError where a file cannot be read.
        """
        return self._found.result()

    def _find(self) -> dict[str, dict]:
        hashes = {path: self._sha256(path) for path in self._used}
        found = {}
        for donor, reader in self._donors.items():
            config = (reader.dir / "config.json").read_bytes()
            files = {path.name: {"size": path.stat().st_size} for path in reader.files()}
            for path in reader.files():
                if path in hashes:
                    files[path.name]["sha256"] = hashes[path]
            found[donor] = {
                "path": str(reader.dir),
                "config_sha256": hashlib.sha256(config).hexdigest(),
                "files": files,
            }
        return found

    def _sha256(self, path: Path) -> str:
        blob = path.resolve()
        if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
            return blob.name  # the hub's cache names a weight file by its hash
        digest, buffer = hashlib.sha256(), bytearray(CHUNK)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                if self._stop.is_set():
                    raise Stopped
        return digest.hexdigest()


def fingerprint(shards: Sequence[Shard]) -> str:
    """Of all that the bytes of these shards depend on, without reading a donor's values.

    A donor's file is known by its path, size, inode and times of change (of which a copier can
    set one back, but not both), a fresh tensor by its values.
    """
    files = []
    for path in _files_read(shards):
        stat = path.stat()
        times = stat.st_mtime_ns, stat.st_ctime_ns
        files.append([str(path.resolve()), stat.st_size, stat.st_ino, *times])
    headers = [[shard.file, hashlib.sha256(shard.header).hexdigest()] for shard in shards]
    origins = [
        [_origin(part) for entry in shard.entries for part in entry.parts] for shard in shards
    ]
    return hashlib.sha256(json.dumps([files, headers, origins]).encode()).hexdigest()


def _files_read(shards: Sequence[Shard]) -> list[Path]:
    """Each once, in the order of their use."""
    parts = (part for shard in shards for entry in shard.entries for part in entry.parts)
    return list(dict.fromkeys(part.path for part in parts if isinstance(part, Stored)))


def _origin(part: Stored | Tensor) -> list:
    if isinstance(part, Stored):
        return [str(part.path), part.offset, part.dtype]
    values = part.reshape(-1).view(torch.uint8).numpy()
    return [hashlib.sha256(values).hexdigest(), str(part.dtype)]

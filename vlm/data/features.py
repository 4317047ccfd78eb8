"""What a frozen ViT makes of images and videos, kept on disk: its output before the merger.

    data worker:  file, grid ──> key ──┬─ found ─────> rows of features instead of patches
                                       └─ not found ─> patches ──> the step's ViT ──> FeatureWriter

A key is a hash of all that the rows follow from, so a file is never out of date: the medium's own
bytes, its grid and frames, and, in the folder's name, the ViT's weights, dtype and code. Files
are written beside their names and renamed, and carry a checksum: one that is torn counts as absent.
So any number of workers, ranks and runs share a folder. Once it is full nothing more is written:
what is there stays, since an epoch asks for everything once, in a new order each time.
"""

import fcntl
import os
import platform
import queue
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from vlm.attention import backend
from vlm.batch import Features
from vlm.data.image import BadImage, describe
from vlm.data.schema import Media
from vlm.vision import VisionTower

WAITING = 8
"""Micro-batches that wait to be written; beyond them none is kept. 20,480 patches of 1,280 bfloat16
values are 52 MB."""
ABANDONED = 3600
"""Seconds after which a half-written file is nobody's."""
CHECKSUM = 4
"""Bytes of CRC-32 behind the rows."""
SIZE = "used"
"""The file that holds the sum of the others' sizes, and whose lock guards it."""
DIGITS = 20
"""Of that sum, always as many: it is written in one go over the last one, and never empty."""
MADE_BY = (
    *("image.py", "video.py", "media.py", "collate.py", "../batch.py", "../vision.py"),
    *("../layers.py", "../attention.py", "../rope.py", "../recompute.py", "../compile.py"),
)
"""Our code that decides the rows; and that of others, by version."""
PACKAGES = (
    *("torch", "flash-attn", "pillow", "opencv-python", "opencv-python-headless"),
    *("opencv-contrib-python", "opencv-contrib-python-headless"),
)


@dataclass(frozen=True)
class FeatureCache:
    """The files of one ViT; what the data workers ask."""

    root: Path
    """Shared by all ViTs, and what the limit is of."""
    tower: str
    """`fingerprint` of the ViT."""
    width: int
    """D, values of a row."""
    dtype: torch.dtype

    @classmethod
    def of(cls, root: Path, tower: VisionTower, is_compiled: bool = False) -> "FeatureCache":
        """Reads all of the tower's weights. OSError where the folder cannot be made."""
        name = fingerprint(tower, is_compiled)
        cache = cls(root.absolute(), name, tower.config.hidden_size, _weight(tower).dtype)
        (cache.root / cache.tower).mkdir(parents=True, exist_ok=True)
        return cache

    def key(self, source: Media | tuple[Media, ...], shape: tuple) -> str:
        """Of a medium, from its bytes and from what else decides its pixels: grid and frames.

        Raises BadImage where a file cannot be read.
        """
        content = sha256(repr(shape).encode())
        for medium in source if isinstance(source, tuple) else (source,):
            content.update(_digest(medium))
        return content.hexdigest()

    def get(self, key: str, patches: int) -> Tensor | None:
        """(patches, D) in window order; None where there is no such file, or a damaged one, which
        is removed."""
        path = self.path(key)
        try:
            with path.open("rb") as file:
                content = bytearray(os.fstat(file.fileno()).st_size)
                file.readinto(content)
        except OSError:
            return None
        size = patches * self.width * self.dtype.itemsize
        checksum = zlib.crc32(memoryview(content)[:size]).to_bytes(CHECKSUM)
        if len(content) != size + CHECKSUM or content[size:] != checksum:
            with suppress(OSError):
                path.unlink()
            return None
        rows = torch.frombuffer(content, dtype=self.dtype, count=patches * self.width)
        return rows.view(patches, self.width)

    def path(self, key: str) -> Path:
        return self.root / self.tower / key[:2] / key

    def none(self) -> Tensor:
        """No row."""
        return torch.zeros(0, self.width, dtype=self.dtype)


def fingerprint(tower: VisionTower, is_compiled: bool = False) -> str:
    """Changes with all that the trunk's output follows from beside the media."""
    weight = _weight(tower)
    device = weight.device.type
    attention = backend(device, weight.dtype)
    libraries = [_version(name) for name in PACKAGES]
    made_by = (device, platform.machine(), attention, is_compiled, libraries)
    content = sha256(repr((tower.config, weight.dtype, made_by)).encode())
    for name in MADE_BY:
        content.update((Path(__file__).parent / name).read_bytes())
    for name, parameter in tower.named_parameters():
        if not name.startswith("merger."):
            content.update(name.encode())
            content.update(_bytes(parameter.detach().cpu()))
    return content.hexdigest()[:32]


def measure(root: Path) -> int:
    """Count the bytes in the folder anew, remove what killed writers left, and return them."""
    with _counter(root) as count:
        for path in root.glob("*/*/*.partial"):
            with suppress(FileNotFoundError):  # another run's, that is removed meanwhile
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        count[0] = bytes_in(root)
    return count[0]


def bytes_in(root: Path) -> int:
    """Those of the files in the folder, which need not exist; nothing is changed."""
    used = 0
    for path in root.glob("*/*/*"):
        with suppress(FileNotFoundError):
            used += path.stat().st_size
    return used


class FeatureWriter:
    """Keeps what the ViT computes, in a thread beside the training, which never waits for it.

    What the disk is too slow for is not kept this time. A folder that is full, or that cannot be
    written, ends the writing; the latter with a warning.
    """

    def __init__(self, cache: FeatureCache, limit: int) -> None:
        """Args: limit: bytes that all files under the cache's root may have."""
        self.cache, self.limit, self.has_room = cache, limit, True
        self._waiting: queue.Queue = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True, name="features")
        self._thread.start()

    def __call__(self, features: Features, computed: Tensor) -> None:
        """Take the trunk's output (P, D) for the media of a batch that were not found."""
        if self.has_room and not self._waiting.full():
            self._waiting.put((features, *_to_host(computed)))

    def close(self) -> None:
        """Write what waits, and end."""
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._waiting.put(None, timeout=1)
                self._thread.join()

    def _work(self) -> None:
        while item := self._waiting.get():
            features, rows, copied = item
            if copied is not None:
                # a thread begins on device 0, and to wait makes a context on whichever it is on
                torch.cuda.set_device(copied.device)
                copied.synchronize()
            self.keep(features, rows)

    def keep(self, features: Features, rows: Tensor) -> None:
        """Write rows that are on the host."""
        new = [medium for medium in features.media if medium[1]]
        parts = rows.split([patches for patches, _ in new])
        for (_, key), part in zip(new, parts, strict=True):
            self.has_room = self.has_room and self._keep(key, part)

    def _keep(self, key: str, rows: Tensor) -> bool:
        """Whether there may be room for more."""
        path = self.cache.path(key)
        payload = _bytes(rows)
        size = CHECKSUM + len(payload)
        try:
            if path.exists():
                return True
            if not (partial := self._reserve(path, size)):
                return False
            try:
                with partial.open("r+b") as file:
                    file.write(payload)
                    file.write(zlib.crc32(payload).to_bytes(CHECKSUM))
                with _counter(self.cache.root):  # so that `measure` sees one name or the other
                    if not path.exists():
                        os.replace(partial, path)
            finally:
                if partial.exists():  # it failed, or another writer was faster
                    self._give_back(partial, size)
        except OSError as error:
            warnings.warn(
                f"no more features are kept, since {self.cache.root} cannot be written ({error})",
                stacklevel=2,
            )
            return False
        return True

    def _reserve(self, path: Path, size: int) -> Path | None:
        """A file beside `path` that has the size already, so that `measure` counts it from now on;
        None where there is no room."""
        with _counter(self.cache.root) as count:
            if count[0] + size > self.limit:
                return None
            path.parent.mkdir(exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
            with os.fdopen(handle, "wb") as file:
                file.truncate(size)
            count[0] += size
        return Path(partial)

    def _give_back(self, partial: Path, size: int) -> None:
        with suppress(OSError), _counter(self.cache.root) as count:
            partial.unlink()
            count[0] -= size


@contextmanager
def keeping(tower: VisionTower, cache: FeatureCache | None, limit: int) -> Iterator[None]:
    """What the tower computes in here is kept; without a cache nothing is.

    Args: limit: bytes, as of FeatureWriter.
    """
    if cache is None:
        yield
        return
    tower.keep = writer = FeatureWriter(cache, limit)
    try:
        yield
    finally:
        tower.keep = None
        writer.close()


@contextmanager
def _counter(root: Path) -> Iterator[list[int]]:
    """The sum of sizes, to be read and changed while nobody else does; after an error it stays."""
    file = os.open(root / SIZE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system without locks: as good as it gets
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        text = os.pread(file, DIGITS, 0)
        count = [int(text) if text.isdigit() else bytes_in(root)]
        yield count
        os.pwrite(file, b"%0*d" % (DIGITS, max(0, count[0])), 0)
    finally:
        os.close(file)


def _to_host(computed: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
    """A copy on the host, and what tells when it is there; the host does not wait here."""
    computed = computed.detach()
    if computed.device.type != "cuda":
        return computed, None
    host = torch.empty(computed.shape, dtype=computed.dtype, pin_memory=True)
    host.copy_(computed, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _digest(medium: Media) -> bytes:
    if isinstance(medium, bytes):
        return sha256(medium).digest()
    try:
        with medium.open("rb") as file:
            return file_digest(file, "sha256").digest()
    except OSError as error:
        raise BadImage(f"{describe(medium)} cannot be read ({error})") from None


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data.cast("B")


def _weight(tower: VisionTower) -> Tensor:
    return tower.patch_embed.proj.weight


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

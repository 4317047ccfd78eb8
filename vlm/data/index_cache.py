"""What the index measured before, on disk, so that only new rows are measured again.

One `.npz` file per source and processor holds the good rows of every chunk, keyed by the chunk's
digest: of the rows themselves, and of where their media are looked for. So rows put into a file
leave its other chunks known, and another limit, template or tokenizer is another file.

Bad rows are not kept: they are measured again each time, since a missing image may be there by
now. A good row has a stamp of its files, and is measured again where one was replaced.

All rows are read for that; `vlm/data/index_snapshot.py` spares it while the data is unchanged.
"""

import os
import tempfile
import warnings
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from vlm.data.processor import Processor, Sizes
from vlm.data.schema import Sample
from vlm.data.sources import Source

MOST_CHUNKS = 4096
"""Chunks of a source that are kept though they were not met this time: about 1 M samples."""
MOST_FILES = 512
"""In the cache's directory, snapshots among them; the ones not used for longest go first."""


def default_cache_dir() -> Path:
    """`$GRAFTVL_CACHE/index`, or `~/.cache/graftvl/index`."""
    return Path(os.environ.get("GRAFTVL_CACHE") or "~/.cache/graftvl").expanduser() / "index"


def processor_fingerprint(processor: Processor) -> str:
    """Changes with all that sizes depend on beside a row: tokenizer, template, limits, code."""
    config = processor.config
    ids = (config.vision_start_token_id, config.vision_end_token_id)
    ids += (config.image_token_id, config.video_token_id)
    settings = (processor.limits, processor.max_length, processor.truncation)
    template = (processor.default_system, processor.think)
    content = sha256(repr((config.vision, ids, settings, template)).encode())
    content.update(processor.tokenizer.to_str().encode())
    content.update(_code())
    return content.hexdigest()


@cache
def _code() -> bytes:
    """Of all of vlm/data, so that there is no version number to forget."""
    paths = sorted(Path(__file__).parent.rglob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in paths)).digest()


@dataclass(frozen=True)
class Measures:
    """Sizes of the good rows of a chunk, or of several. Legend: n samples, m images and videos.

    All int32, but for the stamps.
    """

    row: np.ndarray
    """(n,) number of the row in its chunk, rising."""
    length: np.ndarray
    """(n,) tokens."""
    targets: np.ndarray
    """(n,) learnt tokens."""
    media: np.ndarray
    """(n,) images and videos."""
    stamp: np.ndarray
    """(n,) int64: `media_stamp`."""
    grids: np.ndarray
    """(m, 3) time, height and width in patches, sample after sample."""

    @classmethod
    def of(cls, sizes: dict[int, Sizes], stamps: dict[int, int] | None = None) -> "Measures":
        """Of the sizes and stamps of rows, by their number; all stamps 0 where none are given."""
        sizes = dict(sorted(sizes.items()))
        grids = [grid for size in sizes.values() for grid in size.grid_thw]
        return cls(
            np.array(list(sizes), np.int32),
            np.array([size.length for size in sizes.values()], np.int32),
            np.array([size.targets for size in sizes.values()], np.int32),
            np.array([len(size.grid_thw) for size in sizes.values()], np.int32),
            np.array([stamps[row] if stamps else 0 for row in sizes], np.int64),
            np.array(grids, np.int32).reshape(-1, 3),
        )

    @classmethod
    def joined(cls, parts: list["Measures"]) -> "Measures":
        """One after the other."""
        parts = [cls.of({}), *parts]
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def merged(self, other: "Measures") -> "Measures":
        """Of other rows of the same chunk too, in the order of the rows."""
        both = Measures.joined([self, other])
        return both._taken(np.argsort(both.row))

    def without(self, rows: Collection[int]) -> "Measures":
        """Of the other rows."""
        return self._taken(np.flatnonzero(~np.isin(self.row, list(rows))))

    def _taken(self, order: np.ndarray) -> "Measures":
        pieces = np.split(self.grids, np.cumsum(self.media)[:-1])
        grids = np.concatenate([self.grids[:0], *(pieces[number] for number in order)])
        columns = (self.row, self.length, self.targets, self.media, self.stamp)
        return Measures(*(column[order] for column in columns), grids)


def media_stamp(sample: Sample) -> int:
    """Of the sizes and times of change of a sample's files; 0 where it has none.

    Raises:
        OSError, ValueError: one cannot be found.
    """
    media = [*sample.images]
    for video in sample.videos:
        media += video if isinstance(video, tuple) else [video]
    found = [path.stat() for path in media if isinstance(path, Path)]
    content = repr([(stat.st_size, stat.st_mtime_ns) for stat in found]).encode()
    return int.from_bytes(sha256(content).digest()[:8], "big", signed=True) if found else 0


class IndexCache:
    """The cached chunks of one source, and those that are met this time.

    Safe with several processes: a file is written beside its name and renamed; the last one wins.
    A file that is damaged counts as absent. Without a folder nothing is known, nothing saved.
    """

    def __init__(
        self, folder: Path | None, fingerprint: str, source: Source, rebuild: bool = False
    ) -> None:
        """`rebuild` ignores what the file holds, and replaces it."""
        self.path: Path | None = None
        self.known: dict[bytes, Measures] = {}
        self.met: dict[bytes, Measures] = {}
        self.changed = rebuild
        if folder is None:
            return
        self.path = cache_path(folder, fingerprint, source)
        if not rebuild:
            self.known = _load(self.path)

    def get(self, digest: bytes) -> Measures:
        """The known rows of a chunk; none of a new one."""
        return self.met.get(digest) or self.known.get(digest) or Measures.of({})

    def put(self, digest: bytes, measures: Measures) -> None:
        known = self.get(digest)
        for ours, theirs in ((known.row, measures.row), (known.stamp, measures.stamp)):
            self.changed |= not np.array_equal(ours, theirs)
        self.met[digest] = measures

    def save(self) -> None:
        """Write what is new. A directory that cannot be written costs a warning, no more."""
        if self.path is None or not self.met:
            return
        try:
            if self.changed:
                self._write()
            elif self.path.exists():
                os.utime(self.path)
        except OSError as error:
            warnings.warn(
                f"the index is not cached, since {self.path.parent} cannot be written ({error}); "
                "set GRAFTVL_CACHE to a directory that can",
                stacklevel=2,
            )

    def _write(self) -> None:
        others = [item for item in self.known.items() if item[0] not in self.met]
        chunks = dict(others[:MOST_CHUNKS]) | self.met
        whole = Measures.joined(list(chunks.values()))
        write_arrays(
            self.path,
            digests=np.frombuffer(b"".join(chunks), np.uint8).reshape(len(chunks), -1),
            samples=np.array([len(chunk.row) for chunk in chunks.values()], np.int64),
            **vars(whole),
        )


def cache_path(folder: Path, fingerprint: str, source: Source) -> Path:
    """The file of a source's chunks, for the processor of this `processor_fingerprint`."""
    paths = [str(path.resolve() if path.exists() else path) for path in source.files]
    name = sha256(repr((fingerprint, paths)).encode("utf-8", "surrogateescape")).hexdigest()
    return folder / f"{name[:32]}.npz"


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An `.npz` of these, whole or not at all, in a directory of at most MOST_FILES."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    _prune(path.parent)


def _load(path: Path) -> dict[bytes, Measures]:
    """Chunks by digest; empty where there is no file, or none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as file:  # zip's checksums tell a damaged one
            content = {name: file[name] for name in file.files}
        digests, samples = content.pop("digests"), content.pop("samples")
        whole = Measures(**content)
        stops = np.cumsum(samples)
        media = np.concatenate([[0], np.cumsum(whole.media)])
        chunks = {}
        for digest, start, stop in zip(digests, stops - samples, stops, strict=True):
            columns = (whole.row, whole.length, whole.targets, whole.media, whole.stamp)
            grids = whole.grids[media[start] : media[stop]]
            chunks[digest.tobytes()] = Measures(*(column[start:stop] for column in columns), grids)
        return chunks
    except FileNotFoundError:
        return {}
    except Exception:  # noqa: BLE001 - a cache that cannot be used, for whatever reason, is none
        return {}


def _prune(folder: Path) -> None:
    """Remove the files that were not used for longest, beyond MOST_FILES."""
    found = []
    for path in folder.glob("*.npz"):
        with suppress(FileNotFoundError):  # another process prunes too
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[:-MOST_FILES]:
        path.unlink(missing_ok=True)

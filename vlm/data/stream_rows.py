"""Shards of a stream: their list by path, glob or URL, and their rows one after the other.

A shard is read from its beginning on and never at random, so it may be compressed and lie
anywhere that fsspec can open: `data/*.tar`, `s3://bucket/folder`, `https://...`, `memory://...`.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from vlm.data.formats import parse_line, parse_row
from vlm.data.formats.context import RowContext
from vlm.data.formats.table import plain_row
from vlm.data.schema import BadSample, Sample
from vlm.data.source_lines import MOST_BYTES
from vlm.data.sources import DataError, SourceSpec

IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
VIDEOS = {"mp4", "webm", "mkv", "mov", "avi"}
COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")
PARQUET_ROWS = 64
"""Read at a time; rows may hold whole images."""


@dataclass(frozen=True)
class Shard:
    """One file of a stream."""

    url: str
    """A local path, or a URL of fsspec."""
    size: int | None
    """Bytes, where the file system tells."""
    source: int
    """Number of the source that it belongs to."""
    context: RowContext

    def rows(self, start: int) -> Iterator[tuple[int, object]]:
        """The rows from number `start` on (from 0; blank lines count), for `parse`.

        Raises:
            DataError: the shard cannot be read. It is not skipped: another rank may have been
                able to read it, and all must see the same samples.
        """
        import fsspec

        kind = _kind(self.url)
        try:
            # a tar is decompressed by tarfile, so that any of its suffixes will do
            packed = "infer" if kind.name == "jsonl" else None
            with fsspec.open(self.url, "rb", compression=packed) as file:
                yield from kind.read(file, start)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - file systems and formats have no common one
            brief = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise DataError(f"{self.url} cannot be read ({brief}); repair or remove it") from None

    def parse(self, row: int, raw: object) -> Sample:
        """A row as a Sample; BadSample says what is wrong with it."""
        return _kind(self.url).parse(raw, self.sample_id(row), self.context)

    def sample_id(self, row: int) -> str:
        """`shard:line`; lines count from 1, rows of tables and samples of archives from 0."""
        return f"{self.url}:{row + _kind(self.url).first}"


def find_shards(spec: SourceSpec, source: int, context: RowContext) -> list[Shard]:
    """The shards of one source, by name.

    Raises:
        DataError: there is none, or one is of no known kind.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = fsspec.core.url_to_fs(spec.path)
        if system.isdir(path):
            found = [name for name in system.find(path) if _kind_of(name)]
        else:
            found = system.glob(path) if fsspec.core.has_magic(path) else [path]
        sizes = [(name, system.info(name).get("size")) for name in sorted(found)]
    except FileNotFoundError:
        raise DataError(f"{spec.path} does not exist") from None
    except Exception as error:  # noqa: BLE001 - file systems have no common one
        brief = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{spec.path} cannot be opened ({brief})") from None
    if not sizes:
        raise DataError(f"{spec.path} has no shard; one ends in {', '.join(KINDS)}")
    shards = []
    for name, size in sizes:
        is_local = isinstance(system, LocalFileSystem)  # also `file://...`
        url = name if is_local else system.unstrip_protocol(name)
        _kind(url)
        folder = Path(name).parent if is_local else None
        shards.append(Shard(url, size, source, replace(context, folder=folder)))
    return shards


def _read_lines(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MOST_BYTES + 1):
        if number >= start and line.strip():
            yield number, line
        while len(line) > MOST_BYTES and not line.endswith(b"\n"):
            line = file.readline(MOST_BYTES + 1)  # the rest of a line that is too long
        number += 1


def _parse_line(line: bytes, sample_id: str, context: RowContext) -> Sample:
    if len(line) > MOST_BYTES:
        most = f"{MOST_BYTES >> 20} MiB"
        raise BadSample(sample_id, f"more than {most} of JSON; save its media as files")
    return parse_line(line, sample_id, context)


def _read_parquet(file: BinaryIO, start: int) -> Iterator[tuple[int, dict]]:
    """Groups of rows before `start` are not read at all."""
    from pyarrow.parquet import ParquetFile

    # no threads: data workers are forked, and there is one on every core already
    table = ParquetFile(file, pre_buffer=False)
    number = 0
    for group in range(table.num_row_groups):
        end = number + table.metadata.row_group(group).num_rows
        if end <= start:
            number = end
            continue
        for part in table.iter_batches(PARQUET_ROWS, row_groups=[group], use_threads=False):
            skipped = min(max(start - number, 0), len(part))
            yield from enumerate(part.slice(skipped).to_pylist(), number + skipped)
            number += len(part)


def _parse_row(row: dict, sample_id: str, context: RowContext) -> Sample:
    return parse_row(plain_row(row), sample_id, context)


def _read_tar(file: BinaryIO, start: int) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Samples as WebDataset has them: neighbouring files that are named alike up to the first dot,
    as {name: content}."""
    yield from islice(enumerate(_tar_samples(file)), start, None)


class _Member(tarfile.TarInfo):
    """One that `tarfile` does not take for the end of the archive where it is damaged."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # the mark of the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"cut off or damaged: {error}") from None


def _tar_samples(file: BinaryIO) -> Iterator[dict[str, bytes]]:
    sample, last = {}, None
    with closing(tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member)) as archive:
        for member in archive:
            archive.members = []  # else it remembers all
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            key = (folder, name.partition(".")[0])
            if sample and key != last:
                yield sample
                sample = {}
            last = key
            sample[member.name] = archive.extractfile(member).read()
    if sample:
        yield sample


def _parse_tar(files: dict[str, bytes], sample_id: str, context: RowContext) -> Sample:
    """Media are files beside the JSON: those that it names, or all where it names none."""
    texts = [name for name in files if name.endswith(".json")]
    if len(texts) != 1:
        names = ", ".join(list(files)[:5])
        raise BadSample(sample_id, f"has {len(texts)} .json files among its own ({names}); use one")
    try:
        row = json.loads(files[texts[0]])
    except (ValueError, RecursionError) as error:
        raise BadSample(sample_id, f"{texts[0]} is no JSON ({error!s:.200})") from None
    if not isinstance(row, dict):
        return parse_row(row, sample_id, context)  # which refuses it
    named = {name.rpartition("/")[2]: content for name, content in files.items()} | files
    keys = ("image", "images", "video", "videos")
    if not any(row.get(key) for key in keys):
        for key, suffixes in (("images", IMAGES), ("videos", VIDEOS)):
            found = [c for n, c in files.items() if n.rpartition(".")[2].lower() in suffixes]
            row = {**row, key: found}
    inside = {key: _with_contents(row[key], named) for key in keys if row.get(key)}
    return parse_row({**row, **inside}, sample_id, context)


def _with_contents(value: object, named: dict[str, bytes]) -> object:
    """Names of files in the archive, also in lists, as their content."""
    if isinstance(value, list):
        return [_with_contents(item, named) for item in value]
    return named.get(value, value) if isinstance(value, str) else value


@dataclass(frozen=True)
class _Kind:
    name: str
    first: int
    """Number of the first row in ids."""
    read: Callable[[BinaryIO, int], Iterator[tuple[int, object]]]
    parse: Callable[[object, str, RowContext], Sample]


_JSONL = _Kind("jsonl", 1, _read_lines, _parse_line)
_TAR = _Kind("tar", 0, _read_tar, _parse_tar)
KINDS = {
    **{f".jsonl{suffix}": _JSONL for suffix in COMPRESSIONS},
    ".parquet": _Kind("parquet", 0, _read_parquet, _parse_row),
    **{f".tar{suffix}": _TAR for suffix in COMPRESSIONS if suffix != ".zst"},
    ".tgz": _TAR,
}


def _kind_of(url: str) -> _Kind | None:
    return next((kind for suffix, kind in KINDS.items() if url.endswith(suffix)), None)


def _kind(url: str) -> _Kind:
    kind = _kind_of(url)
    if kind is None:
        raise DataError(f"{url} is no shard of a stream; one ends in {', '.join(KINDS)}")
    return kind

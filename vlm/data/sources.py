"""Sources of training data: what a config names -> rows that can be walked through and read alone.

A source gives its raw rows in chunks, for the index, and any one of them in O(1), for the loader;
either becomes a Sample by the formats (`vlm/data/formats/`).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol, get_args

from vlm.data.formats.context import RowContext
from vlm.data.schema import Sample
from vlm.hub import HUB_ID, Hub

CHUNK_ROWS, MOST_ROWS = 256, 512
"""Of a chunk: about so many, and at most."""
CHUNK_BYTES = 8 * 2**20
"""A chunk ends early where its rows are large."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
MOST_WEIGHT = 1000
"""An epoch's order lies in memory."""
COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar")


class DataError(ValueError):
    """Data that cannot be opened, or of which nothing can be learnt."""


@dataclass(frozen=True)
class SourceSpec:
    """One source as a config or a command line names it."""

    path: str
    """A file, a directory, or a data set's id on a hub: `owner/name` or `owner/name@revision`."""
    name: str | None = None
    """What its loss is logged under; None for the file's own name."""
    weight: float = 1.0
    """How many times its samples appear in an epoch: 2 is each twice, 0.5 half of them."""
    limit: int | None = None
    """Use its first rows only, so many."""
    media_root: str | None = None
    subset: str | None = None
    """Configuration of a data set that has several."""
    split: str | None = None
    """None for `train`, or for the only one."""
    hub: Hub | None = None


@dataclass(frozen=True)
class Place:
    """Where a row lies."""

    file: int
    """Number of the file among the source's."""
    offset: int
    """Byte at which it begins; in a table, the number of the row."""
    line: int
    """Number in the file, as the Sample's id has it: lines from 1; rows of tables and elements of
    JSON arrays from 0."""


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring rows of one file: what one worker of the index takes."""

    file: int
    places: tuple[Place, ...]
    rows: tuple
    """As they lie there, for `Source.parse`; they can be pickled."""
    digest: bytes
    """Of the content of the rows."""


class Source(Protocol):
    name: str
    weight: float
    files: tuple[Path, ...]
    """For messages: the files, or the data set's name alone."""
    stored: tuple[Path, ...]
    """The files that the rows are read from; empty where they lie in memory."""
    limit: int | None
    context: RowContext

    def chunks(self) -> Iterator[Chunk]:
        """All rows up to the limit, in order. Blank lines are none."""
        ...

    def parse(self, row: object, place: Place) -> Sample:
        """A row of a chunk as a Sample; BadSample says what is wrong with it."""
        ...

    def read(self, place: Place) -> Sample:
        """A row read alone, in O(1); BadSample also where the file has changed for the worse."""
        ...


def open_sources(
    specs: Sequence[str | dict | SourceSpec],
    *,
    media_root: Path | str | None = None,
    hub: Hub = "huggingface",
    allow_urls: bool = False,
) -> tuple[Source, ...]:
    """The sources that a config names, in order.

    Args:
        media_root: of the sources that name none of their own. Relative paths of media are
            relative to it, else to the data file's directory; with it no path may leave it.
        hub: that has what is no path here, of the sources that name none of their own.
        allow_urls: download media given as http(s) URLs.

    Raises:
        DataError: one that cannot be opened, or two of one name.
    """
    parsed = [parse_spec(spec) for spec in specs]
    if not parsed:
        raise DataError("no data is named; give at least one file, directory or data set")
    sources: list[Source] = []
    for spec, name in zip(parsed, source_names(parsed), strict=True):
        root = spec.media_root or media_root
        if root is not None and not Path(root).is_dir():
            raise DataError(f"media_root {root} is not a directory")
        context = RowContext(None, Path(root) if root is not None else None, allow_urls)
        sources.append(_open(spec, name, spec.hub or hub, context))
    return tuple(sources)


def parse_spec(spec: str | dict | SourceSpec) -> SourceSpec:
    """`PATH` or `PATH#LIMIT`, or a mapping with the fields of SourceSpec.

    Raises:
        DataError: an unknown key, or a value that means nothing.
    """
    if isinstance(spec, str):
        path, mark, limit = spec.rpartition("#")
        spec = {"path": path, "limit": int(limit)} if mark and limit.isdecimal() else {"path": spec}
    if isinstance(spec, dict):
        known = [field.name for field in fields(SourceSpec)]
        if unknown := [key for key in spec if key not in known]:
            raise DataError(f"a data set has no {unknown[0]!r}; it may have {', '.join(known)}")
        spec = SourceSpec(**{"path": "", **spec})
    _check(spec)
    return spec


def _check(spec: SourceSpec) -> None:
    texts = ("path", "name", "media_root", "subset", "split")
    for key in texts:
        value = getattr(spec, key)
        if (value is not None and not isinstance(value, str)) or value == "":
            raise DataError(f"a data set has {key} {value!r}; use a text")
    if type(spec.weight) not in (int, float) or not 0 < spec.weight <= MOST_WEIGHT:
        raise DataError(
            f"{spec.path} has weight {spec.weight!r}; use a number above 0, at most {MOST_WEIGHT}"
        )
    if spec.limit is not None and (
        type(spec.limit) is not int or not 1 <= spec.limit <= sys.maxsize
    ):
        raise DataError(f"{spec.path} has limit {spec.limit!r}; use a number of rows from 1 on")
    if spec.hub is not None and spec.hub not in get_args(Hub):
        raise DataError(f"{spec.path} has hub {spec.hub!r}; use {' or '.join(get_args(Hub))}")


def source_names(specs: Sequence[SourceSpec]) -> list[str]:
    """Each source's own, else its file's name without the suffix, else (not unique) its path."""
    short = [spec.name or Path(spec.path).stem for spec in specs]
    names = [
        name if spec.name or short.count(name) == 1 else spec.path
        for spec, name in zip(specs, short, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two data sets are called {name}; give each a name of its own")
    return names


def _open(spec: SourceSpec, name: str, hub: Hub, context: RowContext) -> Source:
    """The modules of the kinds of sources need what is above, so they are imported here."""
    path = Path(spec.path)
    if not path.exists():
        if HUB_ID.fullmatch(spec.path) is None or path.suffix in SUFFIXES:
            raise DataError(f"{path} does not exist")
        from vlm.data.source_tables import open_hub

        return open_hub(spec, name, hub, context)
    context = replace(context, folder=path if path.is_dir() else path.parent)
    if path.is_dir() or path.suffix in (".parquet", ".arrow"):
        from vlm.data.source_tables import open_table

        return open_table(spec, name, path, context)
    if spec.split is not None or spec.subset is not None:
        raise DataError(f"{path} is one file, without splits and subsets; leave them out")
    from vlm.data.source_lines import LineSource, open_json

    if path.suffix == ".jsonl":
        return LineSource(name, spec.weight, path, spec.limit, context)
    if path.suffix == ".json":
        return open_json(path, name, spec.weight, spec.limit, context)
    if path.suffix in COMPRESSED:
        raise DataError(f"{path} is compressed, so no sample can be read alone; decompress it")
    raise DataError(
        f"{path} is of no known kind: only .jsonl, .json, .parquet and .arrow files are read, "
        "directories and data sets of a hub"
    )

"""Sources in tables: Parquet and Arrow files, and what the `datasets` library opens.

Rows are read from memory-mapped Arrow, each in O(1); images stay the bytes that they are.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.formats.table import plain_row
from vlm.data.schema import Sample
from vlm.data.sources import CHUNK_BYTES, CHUNK_ROWS, Chunk, DataError, Place, SourceSpec
from vlm.hub import HUB_ID, Hub

if TYPE_CHECKING:
    import datasets
    import pyarrow

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
SAVED = ("state.json", "dataset_dict.json")
"""What `Dataset.save_to_disk` writes, and `DatasetDict.save_to_disk`."""


@dataclass(frozen=True)
class TableSource:
    name: str
    weight: float
    label: str
    """What its samples' ids begin with."""
    table: "datasets.Dataset" = field(repr=False)
    """In the format `arrow`, which decodes nothing."""
    limit: int | None
    context: RowContext

    @property
    def files(self) -> tuple[Path, ...]:
        return (Path(self.label),)

    @property
    def stored(self) -> tuple[Path, ...]:
        return tuple(Path(file["filename"]) for file in self.table.cache_files)

    def chunks(self) -> Iterator[Chunk]:
        rows = len(self.table) if self.limit is None else min(len(self.table), self.limit)
        start = 0
        while start < rows:
            part = self.table[start : min(start + CHUNK_ROWS, rows)]
            while part.nbytes > CHUNK_BYTES and len(part) > 1:
                part = part.slice(0, len(part) // 2)
            numbers = range(start, start + len(part))
            places = tuple(Place(0, number, number) for number in numbers)
            digest = _digest(part, self.context)
            yield Chunk(0, places, tuple(part.to_pylist()), digest)
            start += len(part)

    def parse(self, row: dict, place: Place) -> Sample:
        return parse_row(plain_row(row), f"{self.label}:{place.line}", self.context)

    def read(self, place: Place) -> Sample:
        return self.parse(self.table[place.offset].to_pylist()[0], place)


def open_table(spec: SourceSpec, name: str, path: Path, context: RowContext) -> TableSource:
    """A Parquet or Arrow file, or a directory that `datasets` can open.

    Raises:
        DataError: `datasets` is not installed or cannot open it, or it has several splits.
    """
    if path.is_file():
        files = glob.escape(str(path))  # `datasets` takes patterns
        return _open(spec, name, context, BUILDERS[path.suffix], data_files=files)
    return _open(spec, name, context, str(path))


def open_hub(spec: SourceSpec, name: str, hub: Hub, context: RowContext) -> TableSource:
    """A data set of a hub, fetched into the cache of the hub's own client.

    Raises:
        DataError: as `open_table`, or it cannot be had now.
    """
    match = HUB_ID.fullmatch(spec.path)
    if hub == "modelscope":
        folder = _fetch_from_modelscope(match["id"], match["revision"])
        return open_table(spec, name, folder, replace(context, folder=folder))
    return _open(spec, name, context, match["id"], revision=match["revision"])


def _open(
    spec: SourceSpec, name: str, context: RowContext, what: str, **options: Any
) -> TableSource:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{spec.path} needs the `datasets` library: pip install graftvl[train]"
        ) from None
    try:
        if any((Path(what) / file).is_file() for file in SAVED):
            loaded = datasets.load_from_disk(what)
        else:
            loaded = datasets.load_dataset(what, spec.subset, **options)
    except Exception as error:  # noqa: BLE001 - its errors have no base of their own
        raise DataError(f"{spec.path} cannot be opened as a data set ({_brief(error)})") from None
    table = _choose_split(loaded, spec)
    label = "/".join(filter(None, (str(Path(spec.path)), spec.subset, spec.split)))
    return TableSource(name, spec.weight, label, table.with_format("arrow"), spec.limit, context)


def _fetch_from_modelscope(name: str, revision: str | None) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise DataError(
            f"{name} is to come from modelscope, whose client is not installed: "
            "pip install graftvl[modelscope]"
        ) from None
    from huggingface_hub.constants import HF_HUB_OFFLINE  # holds for both, as for models

    try:
        options = {"repo_type": "dataset", "local_files_only": HF_HUB_OFFLINE}
        folder = Path(snapshot_download(name, revision, **options))
        # offline this client takes a download that was broken off for a whole one
        if torn := next(folder.rglob("*.incomplete"), None):
            raise FileNotFoundError(f"{torn.name} is left of a download that was broken off")
        return folder
    except Exception as error:  # noqa: BLE001 - its errors have no base of their own
        raise DataError(
            f"{name} is no path here and could not be had from modelscope ({_brief(error)})"
        ) from None


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _choose_split(loaded: Any, spec: SourceSpec) -> "datasets.Dataset":
    if not isinstance(loaded, dict):
        if spec.split is not None:
            raise DataError(f"{spec.path} has no splits; leave {spec.split!r} out")
        return loaded
    split = spec.split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if split not in loaded:
        raise DataError(
            f"{spec.path} has no split {split!r}; set split to one of {', '.join(loaded)}"
        )
    return loaded[split]


def _digest(part: "pyarrow.Table", context: RowContext) -> bytes:
    """Of the rows' content, however the table is cut into pieces in memory."""
    import pyarrow

    content = sha256(context.fingerprint())

    class Hash:
        closed = False

        def write(self, block: "pyarrow.Buffer") -> int:
            content.update(block)
            return len(block)

        def flush(self) -> None:
            pass

    whole = part.replace_schema_metadata(None).combine_chunks()
    with pyarrow.ipc.new_stream(pyarrow.PythonFile(Hash(), mode="w"), whole.schema) as stream:
        stream.write_table(whole)
    return content.digest()

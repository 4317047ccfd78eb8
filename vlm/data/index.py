"""The index: where every sample lies and what it will take, without decoding a pixel.

About 40 bytes a sample, so a million fit easily. Bad samples are found here as far as text
and the headers of images and videos show them, and are left out.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vlm.data.formats.messages import parse_line
from vlm.data.ledger import Entry
from vlm.data.processor import Processor, Sizes
from vlm.data.schema import BadSample, Sample

CHUNK_LINES = 256


class DataError(ValueError):
    """Data files that are missing, empty or of an unknown format."""


@dataclass(frozen=True)
class Index:
    """Good samples, in the order of the files. Legend: n samples."""

    files: tuple[Path, ...]
    file: np.ndarray
    """(n,) int32: number of the file."""
    offset: np.ndarray
    """(n,) int64: byte at which the line begins."""
    line: np.ndarray
    """(n,) int64, from 1."""
    length: np.ndarray
    """(n,) int32: tokens."""
    targets: np.ndarray
    """(n,) int32: learnt tokens."""
    patches: np.ndarray
    """(n,) int32."""
    cost: np.ndarray
    """(n,) float64: useful FLOPs."""

    def __len__(self) -> int:
        return len(self.length)

    def fingerprint(self) -> str:
        """Changes when a sample is added, removed, moved or measured otherwise."""
        columns = (self.file, self.offset, self.length, self.targets, self.patches)
        return sha256(b"".join(column.tobytes() for column in columns)).hexdigest()[:16]

    def sample(self, number: int) -> Sample:
        """Read one sample; BadSample where the file has changed for the worse."""
        path = self.files[self.file[number]]
        with path.open("rb") as file:
            file.seek(int(self.offset[number]))
            line = file.readline()
        return parse_line(line, f"{path}:{self.line[number]}", path.parent)


def build_index(
    files: Sequence[Path | str],
    processor: Processor,
    cost: Callable[[Sizes], float],
    workers: int = 1,
) -> tuple[Index, list[Entry]]:
    """Measure every sample of some JSONL files.

    Args:
        cost: FLOPs of a sample of given sizes.
        workers: processes that share the work; 1 is this one alone.

    Returns:
        The index of the good samples, and an entry for each bad one.

    Raises:
        DataError: a file that is missing or not JSONL, or no good sample at all.
    """
    paths = tuple(Path(file) for file in files)
    for path in paths:
        if path.suffix != ".jsonl":
            raise DataError(f"{path}: only .jsonl files are read (one sample a line)")
        if not path.is_file():
            raise DataError(f"{path} does not exist")
    rows, bad = [], []
    with tqdm(desc="index", unit=" samples", disable=None) as bar:
        for good, entries in _measured(paths, processor, cost, workers):
            rows += good
            bad += entries
            bar.update(len(good) + len(entries))
    if not rows:
        reason = f"; the first: {bad[0].id}: {bad[0].reason}" if bad else ""
        raise DataError(f"no sample to learn from in {', '.join(map(str, paths))}{reason}")
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    kinds = (np.int32, np.int64, np.int64, np.int32, np.int32, np.int32, np.float64)
    fields = (column.astype(kind) for column, kind in zip(columns, kinds, strict=True))
    return Index(paths, *fields), bad


def _measured(paths, processor: Processor, cost, workers: int):
    """(rows, bad entries) of each chunk of lines, in order."""
    chunks = chain.from_iterable(_chunks(number, path) for number, path in enumerate(paths))
    if workers <= 1:
        for number, path, lines in chunks:
            yield _measure_chunk(number, path, lines, processor, cost)
        return
    initial = (processor, cost)
    context = get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_remember, initargs=initial) as pool:
        pending = deque()  # a few chunks ahead: Executor.map would read the whole file first
        for chunk in chunks:
            pending.append(pool.submit(_measure_remembered, chunk))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _chunks(number: int, path: Path) -> Iterator[tuple[int, Path, list[tuple[int, int, bytes]]]]:
    """Lines of a file, a few at a time, each with its number and byte offset."""
    chunk, offset = [], 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if line.strip():
                chunk.append((line_number, offset, line))
            offset += len(line)
            if len(chunk) == CHUNK_LINES:
                yield number, path, chunk
                chunk = []
    if chunk:
        yield number, path, chunk


def _measure_chunk(number: int, path: Path, lines, processor: Processor, cost):
    rows, bad = [], []
    for line_number, offset, line in lines:
        sample_id = f"{path}:{line_number}"
        try:
            sizes = processor.measure(parse_line(line, sample_id, path.parent))
        except BadSample as error:
            bad.append(Entry(sample_id, error.reason, "index"))
            continue
        patches = sum(t * h * w for t, h, w in sizes.grid_thw)
        place = (number, offset, line_number)
        rows.append((*place, sizes.length, sizes.targets, patches, cost(sizes)))
    return rows, bad


_worker: tuple = ()


def _remember(*state) -> None:
    global _worker
    _worker = state


def _measure_remembered(chunk):
    return _measure_chunk(*chunk, *_worker)

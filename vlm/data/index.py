"""The index: where every sample lies and what it will take, without decoding a pixel.

    python -m vlm.data.index DATA... --model DIR

measures some data as training would, prints histogram, totals and what will be dropped and why,
and leaves the measures in the cache that training reads. Exit code 2 is a mistake in what was
asked for, told in one sentence. Bad samples are found here as far as text and the headers of
images and videos show them.
"""

import argparse
import sys
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vlm.config import VLMConfig
from vlm.cost import sample_flops_array
from vlm.data.index_cache import IndexCache, Measures, default_cache_dir, processor_fingerprint
from vlm.data.index_report import index_report
from vlm.data.index_snapshot import Snapshot, SourceMeasures
from vlm.data.index_work import Result, measure_rows, open_executor
from vlm.data.ledger import Entry
from vlm.data.options import data_parser, exit_code, open_data
from vlm.data.processor import Processor
from vlm.data.schema import Sample
from vlm.data.sources import Chunk, DataError, Place, Source
from vlm.data.watch import DataWorkerError


@dataclass(frozen=True)
class Index:
    """Good samples, in the order of the sources. Legend: n samples, m images and videos.

    34 bytes a sample and 12 an image or video: 46 MB for a million samples with an image each.
    """

    sources: tuple[Source, ...]
    source: np.ndarray
    """(n,) int16: number of the source."""
    file: np.ndarray
    """(n,) int32: number of the file in the source."""
    offset: np.ndarray
    """(n,) int64: as in Place; so is the next."""
    line: np.ndarray
    """(n,) int32."""
    length: np.ndarray
    """(n,) int32: tokens."""
    targets: np.ndarray
    """(n,) int32: learnt tokens."""
    patches: np.ndarray
    """(n,) int32."""
    media: np.ndarray
    """(n,) int32: images and videos."""
    grids: np.ndarray
    """(m, 3) int32: time, height and width in patches, sample after sample."""

    def __len__(self) -> int:
        return len(self.length)

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each source."""
        return tuple(np.bincount(self.source, minlength=len(self.sources)).tolist())

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the sources."""
        return tuple(source.weight for source in self.sources)

    def costs(self, config: VLMConfig, trains: Collection[str]) -> np.ndarray:
        """(n,) float64: useful FLOPs, as `vlm.cost.sample_flops` has them."""
        owners = np.repeat(np.arange(len(self)), self.media)
        columns = (self.length, self.grids, owners, self.targets)
        return sample_flops_array(config, *columns, trains)

    def fingerprint(self) -> str:
        """Changes when a sample is added, removed, moved, measured or weighed otherwise."""
        columns = (self.source, self.file, self.offset, self.length, self.targets, self.patches)
        content = sha256(repr(self.weights).encode())
        content.update(b"".join(column.tobytes() for column in columns))
        return content.hexdigest()[:16]

    def select(self, numbers: np.ndarray) -> "Index":
        """The samples of these numbers (rising) alone; their sources stay as they are."""
        names = ("source", "file", "offset", "line", "length", "targets", "patches", "media")
        columns = {name: getattr(self, name)[numbers] for name in names}
        owners = np.repeat(np.arange(len(self)), self.media)
        return replace(self, **columns, grids=self.grids[np.isin(owners, numbers)])

    def sample_id(self, number: int) -> str:
        files = self.sources[self.source[number]].files
        return f"{files[self.file[number]]}:{self.line[number]}"

    def sample(self, number: int) -> Sample:
        """Read one sample; BadSample where the file has changed for the worse."""
        place = (int(column[number]) for column in (self.file, self.offset, self.line))
        return self.sources[self.source[number]].read(Place(*place))


def build_index(
    sources: Sequence[Source],
    processor: Processor,
    workers: int = 1,
    cache_dir: Path | None = None,
    rebuild: bool = False,
) -> tuple[Index, list[Entry]]:
    """Measure every sample, but for those that the cache knows.

    Of a source whose files did not change nothing is read but bad rows and a bounded number of
    samples (`vlm/data/index_snapshot.py`). Else its rows are all read and hashed; of what is known
    no text is tokenized and no file opened again, but for the files that were replaced since.

    Args:
        workers: processes that share the work; 1 is this one alone.
        cache_dir: None for no cache.
        rebuild: measure everything, and replace what the cache has of these sources.

    Returns:
        The index of the good samples, and an entry for each bad one.

    Raises:
        DataError: data that cannot be read, or no good sample at all.
        DataWorkerError: a process died.
    """
    fingerprint = processor_fingerprint(processor) if cache_dir else ""
    ahead = 4 * workers if workers > 1 else 0
    found, bad = [], []
    bar = tqdm(desc="index", unit=" samples", disable=None)
    with bar, open_executor(tuple(sources), processor, workers) as executor:
        for number, source in enumerate(sources):
            snapshot = Snapshot(cache_dir, fingerprint, source)
            known = None if rebuild else snapshot.load(processor)
            if known is None:
                cache = IndexCache(cache_dir, fingerprint, source, rebuild)
                try:
                    known = _joined(_measured(number, source, cache, executor, ahead), bar)
                finally:
                    cache.save()  # interrupted: what is measured stays measured
                snapshot.save(known)
            found.append(known)
            bad += [
                Entry(f"{source.files[place.file]}:{place.line}", reason, "index")
                for place, reason in known.bad
            ]
    whole = Measures.joined([known.measures for known in found])
    if not len(whole.row):
        names = ", ".join(str(file) for source in sources for file in source.files)
        reason = f"; the first: {bad[0].id}: {bad[0].reason}" if bad else ""
        raise DataError(f"no sample to learn from in {names}{reason}")
    counts = [len(known.places) for known in found]
    file, offset, line = np.concatenate([known.places for known in found]).T
    owners = np.repeat(np.arange(len(whole.row)), whole.media)
    patches = np.bincount(owners, whole.grids.prod(axis=1), len(whole.row))
    index = Index(
        tuple(sources),
        np.repeat(np.arange(len(counts), dtype=np.int16), counts),
        file.astype(np.int32),
        np.ascontiguousarray(offset),
        line.astype(np.int32),
        whole.length,
        whole.targets,
        patches.astype(np.int32),
        whole.media,
        whole.grids,
    )
    return index, bad


def _joined(results: Iterator[tuple[Chunk, Measures, dict[int, str]]], bar: tqdm) -> SourceMeasures:
    """Of a whole source, from the results of its chunks."""
    places, parts, bad = [np.zeros((0, 3), np.int64)], [], []
    for chunk, measures, reasons in results:
        found = [(place.file, place.offset, place.line) for place in chunk.places]
        places.append(np.array(found, np.int64)[measures.row])
        parts.append(measures)
        bad += [(chunk.places[row], reason) for row, reason in sorted(reasons.items())]
        bar.update(len(chunk.rows))
    return SourceMeasures(np.concatenate(places), Measures.joined(parts), tuple(bad))


def _measured(
    number: int, source: Source, cache: IndexCache, executor: Executor, ahead: int
) -> Iterator[tuple[Chunk, Measures, dict[int, str]]]:
    """Measures and bad rows of each chunk, in order.

    Only a few chunks are read ahead: data with images inside may be larger than the memory.
    """
    pending: deque[tuple[Chunk, Measures, Future[Result]]] = deque()

    def finish() -> tuple[Chunk, Measures, dict[int, str]]:
        chunk, known, future = pending.popleft()
        try:
            sizes, stamps, reasons = future.result()
        except BrokenProcessPool:
            place = chunk.places[0]
            raise DataWorkerError(
                f"a process that indexes the data died, at or soon after "
                f"{source.files[place.file]}:{place.line}; is memory short, or a file broken? "
                "Fewer dataset_num_proc take less memory"
            ) from None
        measures = known
        if sizes or reasons:
            measures = known.without({*sizes, *reasons}).merged(Measures.of(sizes, stamps))
        cache.put(chunk.digest, measures)
        return chunk, measures, reasons

    for chunk in source.chunks():
        known = cache.get(chunk.digest)
        stamps = dict(zip(known.row.tolist(), known.stamp.tolist(), strict=True))
        # known without files needs no look; what is new has no stamp
        if rows := [
            (row, raw, place, stamps.get(row))
            for row, (raw, place) in enumerate(zip(chunk.rows, chunk.places, strict=True))
            if stamps.get(row) != 0
        ]:
            try:
                future = executor.submit(measure_rows, number, rows)
            except BrokenProcessPool as error:  # told in its turn, behind the chunk that broke it
                future = Future()
                future.set_exception(error)
        else:
            future = Future()
            future.set_result(({}, {}, {}))
        pending.append((chunk, known, future))
        if len(pending) > ahead:
            yield finish()
    while pending:
        yield finish()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = data_parser("index", __doc__)
    add = parser.add_argument
    add("--dataset_num_proc", type=int, default=8, help="processes that share the work")
    add("--rebuild", action="store_true", help="measure anew what the cache knows")
    return parser.parse_args(arguments)


def measure_and_tell(arguments: Sequence[str] | None) -> int:
    options = parse_arguments(arguments)
    sources, processor = open_data(options)
    workers, folder = options.dataset_num_proc, default_cache_dir()
    print(index_report(*build_index(sources, processor, workers, folder, options.rebuild)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    interrupted = "interrupted; what was measured is in the cache"
    return exit_code(lambda: measure_and_tell(arguments), interrupted)


if __name__ == "__main__":
    sys.exit(main())

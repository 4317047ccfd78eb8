"""Data that cannot be indexed: a window of it is read, measured, shuffled and planned at a time.

    shards ──> rows ──> window of good samples ──> Plan of the window ──> Steps
    (order by seed      (stream_window global      (vlm/data/plan.py)     (vlm/data/loader.py)
    and epoch)          batches; the epoch's last
                        may be smaller)

Every rank and every data worker reads the same rows, and decodes the pixels of its own samples
alone. So nothing is communicated, and the sequence of global batches depends on neither. A
position says where its window begins, so a run resumes after reading one window again.

Ranks are balanced by useful FLOPs, a warm `feature_cache` or not: what a stream shows again, and
when, nobody knows.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vlm.batch import Batch
from vlm.data.features import FeatureCache
from vlm.data.formats.context import RowContext
from vlm.data.index import Index
from vlm.data.index_cache import Measures
from vlm.data.ledger import Entry
from vlm.data.loader import TEXT_ALONE, Step, StepDataset
from vlm.data.pack import Budget
from vlm.data.plan import Plan, Position
from vlm.data.processor import Processor, Sizes
from vlm.data.schema import BadSample, Sample
from vlm.data.sources import DataError, SourceSpec, parse_spec, source_names
from vlm.data.stream_rows import Shard, find_shards
from vlm.data.watch import Watch

Row = tuple[int, int, int, object]
"""A shard's place in the epoch's order, its number, the row's number in it, and the row."""
ROW_BITS = 32
"""Of the number under which a worker tells the row that it is at; the others are the shard's."""


@dataclass(frozen=True)
class Stream:
    names: tuple[str, ...]
    """Of the sources."""
    shards: tuple[Shard, ...]
    """Of all sources; an epoch reads each once."""

    def order(self, seed: int, epoch: int) -> list[int]:
        """Numbers of the shards in an epoch's order."""
        return np.random.default_rng((seed, epoch)).permutation(len(self.shards)).tolist()

    def fingerprint(self, processor: Processor, window: int) -> str:
        """Changes where the same seed would give other batches, as far as can be told without
        reading the shards: by their names and sizes."""
        shards = [(shard.url, shard.size, shard.source) for shard in self.shards]
        limits = (processor.limits, processor.max_length, processor.truncation, processor.think)
        content = repr((shards, window, limits))
        return sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def open_stream(
    specs: Sequence[str | dict | SourceSpec],
    *,
    media_root: Path | str | None = None,
    allow_urls: bool = False,
) -> Stream:
    """The shards that a config names: files, directories or globs, local or URLs of fsspec.

    Raises:
        DataError: no shard where one is named, or an option that a stream cannot have.
    """
    parsed = [parse_spec(spec) for spec in specs]
    shards = []
    for number, spec in enumerate(parsed):
        plain = SourceSpec(spec.path, spec.name, media_root=spec.media_root)
        if spec != plain:
            raise DataError(
                f"{spec.path} is streamed, so it may have path, name and media_root alone"
            )
        root = spec.media_root or media_root
        if root is not None and not Path(root).is_dir():
            raise DataError(f"media_root {root} is not a directory")
        context = RowContext(None, Path(root) if root is not None else None, allow_urls)
        shards += find_shards(spec, number, context)
    return Stream(tuple(source_names(parsed)), tuple(shards))


@dataclass(frozen=True)
class _Source:
    """What a Step wants to know of a source."""

    name: str


@dataclass(frozen=True)
class Window(Index):
    """An index of samples in memory."""

    samples: tuple[Sample, ...]

    def sample_id(self, number: int) -> str:
        return self.samples[number].id

    def sample(self, number: int) -> Sample:
        return self.samples[number]


@dataclass(frozen=True)
class StreamDataset:
    """Steps of one rank, as `StepDataset` has them."""

    stream: Stream
    processor: Processor
    trains: frozenset[str]
    """Parts that are trained, for the cost of samples."""
    global_batch_size: int
    window: int
    """Global batches that are read and shuffled together."""
    seed: int
    rank: int
    world: int
    budget: Budget
    skips_text: bool = False
    watch: Watch | None = None
    features: FeatureCache | None = None

    @property
    def sources(self) -> list[str]:
        """Their names."""
        return list(self.stream.names)

    def sample_id(self, number: int) -> str:
        """Of a number that `Watch` has."""
        shard, row = divmod(number, 1 << ROW_BITS)
        return self.stream.shards[shard].sample_id(row)

    def loading(self, start: Position) -> dict:
        """What a DataLoader needs to give the steps from `start` on."""
        return {"dataset": _Steps(self, start)}

    def costliest(self) -> Batch:
        """The costliest micro-batch of the first window that teaches; what comes later may be
        costlier. DataError where no window does."""
        rows = self._rows(Position(0, 0))
        window, _, bad = self._read_window(rows)
        if not len(window):
            raise self._nothing(bad)
        while self.skips_text and not window.patches.any():
            window, _, _ = self._read_window(rows)
            if not len(window):
                raise DataError(TEXT_ALONE)
        plan = self._plan(window, 0, 0)
        return StepDataset(window, self.processor, plan, self.rank).costliest()

    def steps(self, start: Position, worker: int = 0, workers: int = 1) -> Iterator[Step]:
        """Those from `start` on, without end; of several workers each gives every n-th."""
        number, bad = 0, []
        for epoch in count(start.epoch):
            begin = start if epoch == start.epoch else Position(epoch, 0)
            rows, mark = self._rows(begin), (begin.shard, begin.row)
            found = begin.batch
            for first in count(begin.batch - begin.batch % self.window, self.window):
                window, end, new = self._read_window(rows)
                bad += new  # of a window that begins later, too, where this one is empty
                if not len(window):
                    break
                plan = self._plan(window, epoch, first)
                dataset = StepDataset(
                    window, self.processor, plan, self.rank, features=self.features
                )
                checksum = zlib.crc32(
                    "\n".join(s.id for s in window.samples).encode(errors="surrogatepass")
                )
                for place in range(plan.steps_per_epoch):
                    found = first + place + 1
                    if found <= begin.batch:
                        continue
                    if number % workers == worker:
                        step = dataset[Position(0, place)]
                        self._at(-1)
                        yield replace(
                            step,
                            position=Position(epoch, found - 1, *mark),
                            next=Position(
                                epoch, found, *(mark if place + 1 < plan.steps_per_epoch else end)
                            ),
                            # all ranks found them, one tells
                            bad=step.bad + ([] if self.rank or place else bad),
                            window=checksum,
                        )
                    number += 1
                bad, mark = [], end
            if not found:
                raise self._nothing(bad)

    def _rows(self, start: Position) -> Iterator[Row]:
        """All from there to the end of the epoch."""
        order = self.stream.order(self.seed, start.epoch)
        for place in range(start.shard, len(order)):
            shard = self.stream.shards[order[place]]
            for row, raw in shard.rows(start.row if place == start.shard else 0):
                yield place, order[place], row, raw

    def _read_window(self, rows: Iterator[Row]) -> tuple[Window, tuple[int, int], list[Entry]]:
        """The next good samples, where the next window begins, and the bad ones on the way."""
        samples: list[Sample] = []
        sizes: list[Sizes] = []
        sources: list[int] = []
        bad: list[Entry] = []
        end = (len(self.stream.shards), 0)
        for place, number, row, raw in rows:
            shard = self.stream.shards[number]
            self._at((number << ROW_BITS) + row)
            try:
                sample = shard.parse(row, raw)
                sizes.append(self.processor.measure(sample))
            except BadSample as error:
                bad.append(Entry(error.sample_id, error.reason, "reading"))
                continue
            samples.append(sample)
            sources.append(shard.source)
            if len(samples) == self.window * self.global_batch_size:
                end = (place, row + 1)
                break
        self._at(-1)
        return self._index(samples, sizes, sources), end, bad

    def _index(self, samples, sizes, sources) -> Window:
        measures = Measures.of(dict(enumerate(sizes)))
        owners = np.repeat(np.arange(len(samples)), measures.media)
        patches = np.bincount(owners, measures.grids.prod(axis=1), len(samples))
        none = np.zeros(len(samples), np.int64)  # nothing is read again
        return Window(
            sources=tuple(map(_Source, self.stream.names)),
            source=np.array(sources, np.int16),
            file=none,
            offset=none,
            line=none,
            length=measures.length,
            targets=measures.targets,
            patches=patches.astype(np.int32),
            media=measures.media,
            grids=measures.grids,
            samples=tuple(samples),
        )

    def _plan(self, window: Window, epoch: int, first: int) -> Plan:
        """Of the window whose first global batch is number `first` of the epoch."""
        state = np.random.SeedSequence((self.seed, epoch, first)).generate_state(1)
        return Plan(
            lengths=window.length,
            patches=window.patches,
            targets=window.targets,
            costs=window.costs(self.processor.config, self.trains),
            counts=(len(window),),
            weights=(1.0,),
            global_batch_size=self.global_batch_size,
            seed=int(state[0]),
            world=self.world,
            budget=self.budget,
            skips_text=self.skips_text,
        )

    def _at(self, number: int) -> None:
        if self.watch:
            self.watch.at(number)

    def _nothing(self, bad: list[Entry]) -> DataError:
        reason = f"; the first: {bad[0].id}: {bad[0].reason}" if bad else ""
        return DataError(f"no sample to learn from in {', '.join(self.sources)}{reason}")


@dataclass(frozen=True)
class _Steps(IterableDataset):
    """A DataLoader takes one item of each worker in turn, which restores the order."""

    data: StreamDataset
    start: Position

    def __iter__(self) -> Iterator[Step]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return self.data.steps(self.start, worker, workers)

"""Dataset and DataLoader over a plan: one item is one rank's part of one optimiser step."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import prod
from multiprocessing import active_children
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlm.batch import Batch
from vlm.data.collate import collate
from vlm.data.features import FeatureCache
from vlm.data.index import Index
from vlm.data.ledger import Entry
from vlm.data.pack import Budget
from vlm.data.plan import Plan, Position
from vlm.data.processor import IGNORED, Example, Processor
from vlm.data.schema import BadSample
from vlm.data.sources import DataError
from vlm.data.watch import DataWorkerError, Watch

if TYPE_CHECKING:
    from vlm.data.stream import StreamDataset


TEXT_ALONE = (
    "no sample has an image or video, so there is nothing to learn while the language model is "
    "frozen"
)


@dataclass(frozen=True)
class Step:
    """One rank's micro-batches of one optimiser step."""

    position: Position
    micro_batches: list[Batch]
    bad: list[Entry]
    """Samples found bad at decoding, which the micro-batches lack."""
    flops: float
    """Useful FLOPs of the samples, by the index."""
    skipped_targets: int
    """Targets of text alone that the plan leaves out; the first rank answers for them all."""
    sources: int
    """How many the data has."""
    next: Position
    """Of the step after this one."""
    window: int = 0
    """Of a stream: checksum of the samples it was planned with, the same on all ranks."""

    @property
    def ids(self) -> list[str]:
        """The samples of all micro-batches."""
        return [name for batch in self.micro_batches for name in batch.ids]

    @property
    def samples(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return sum(len(batch.input_ids) for batch in self.micro_batches if batch.ids)

    @property
    def targets(self) -> int:
        """This rank's share of the loss's denominator. Weights scale the sum, not the count."""
        return self.skipped_targets + sum(len(batch.targets) for batch in self.micro_batches)

    @property
    def targets_by_source(self) -> list[int]:
        """Those that the loss is computed at."""
        counts = torch.zeros(self.sources, dtype=torch.int64)
        for batch in self.micro_batches:
            counts += torch.bincount(batch.sources, minlength=self.sources)
        return counts.tolist()

    def pin_memory(self) -> "Step":
        """The DataLoader's hook: pinned, so that the copy to the device is asynchronous."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


def make_plan(
    index: Index,
    costs: np.ndarray,
    global_batch_size: int,
    seed: int,
    world: int,
    budget: Budget,
    skips_text: bool = False,
    later_costs: np.ndarray | None = None,
) -> Plan:
    """The plan of indexed data; arguments as in `Plan`, costs from `Index.costs`.

    DataError where it would skip every sample, or an epoch has none.
    """
    if skips_text and not index.patches.any():
        raise DataError(TEXT_ALONE)
    plan = Plan(
        lengths=index.length,
        patches=index.patches,
        targets=index.targets,
        costs=costs,
        counts=index.counts,
        weights=index.weights,
        global_batch_size=global_batch_size,
        seed=seed,
        world=world,
        budget=budget,
        later_costs=later_costs,
        skips_text=skips_text,
    )
    if not plan.epoch_samples:
        raise DataError(
            "an epoch has no sample, since the weights leave too little of the data; raise them"
        )
    return plan


@dataclass(frozen=True)
class StepDataset(Dataset):
    """Position -> Step, for one rank. The order of everything is the plan's."""

    index: Index
    processor: Processor
    plan: Plan
    rank: int
    watch: Watch | None = None
    features: FeatureCache | None = None

    @property
    def sources(self) -> list[str]:
        """Their names."""
        return [source.name for source in self.index.sources]

    def __getitem__(self, position: Position) -> Step:
        bad: list[Entry] = []
        mine = self.plan.ranks(position)[self.rank]
        return Step(
            position,
            [self._batch(numbers, bad) for numbers in mine],
            bad,
            flops=sum(float(self.plan.costs[numbers].sum()) for numbers in mine),
            skipped_targets=0 if self.rank else self.plan.skipped_targets(position),
            sources=len(self.sources),
            next=self._after(position),
        )

    def sample_id(self, number: int) -> str:
        """Of a number that `Watch` has."""
        return self.index.sample_id(number)

    def loading(self, start: Position) -> dict:
        """What a DataLoader needs to give the steps from `start` on."""
        return {"dataset": self, "sampler": _Positions(self.plan, start)}

    def costliest(self) -> Batch:
        """The micro-batch that takes most memory (`Plan.costliest`), with nothing of it cached."""
        return replace(self, features=None)._batch(self.plan.costliest(), [])

    def _after(self, position: Position) -> Position:
        size = self.plan.steps_per_epoch
        return Position(*divmod(position.epoch * size + position.batch + 1, size))

    def _batch(self, numbers: list[int], bad: list[Entry]) -> Batch:
        examples = [(self._example(number, bad), self.index.source[number]) for number in numbers]
        good = [(example, source) for example, source in examples if example is not None]
        sources = [int(source) for _, source in good]
        return collate([example for example, _ in good], self.processor.config, sources)

    def _example(self, number: int, bad: list[Entry]) -> Example | None:
        if self.watch:
            self.watch.at(number)
        try:
            example = self.processor.encode(self.index.sample(number), self.features)
            self._compare(example, number)
            return example
        except BadSample as error:
            bad.append(Entry(error.sample_id, error.reason, "decoding"))
            return None
        finally:
            if self.watch:
                self.watch.at(-1)

    def _compare(self, example: Example, number: int) -> None:
        """BadSample where the index told other sizes: the plan's budgets rely on them."""
        learnt = int((example.targets != IGNORED).sum())
        found = (example.length, learnt, sum(map(prod, example.grid_thw)))
        columns = (self.index.length, self.index.targets, self.index.patches)
        told = tuple(int(column[number]) for column in columns)
        if found != told:
            raise BadSample(
                example.id,
                "has {} tokens ({} learnt) and {} patches".format(*found)
                + ", but had {} ({}) and {} when it was indexed; ".format(*told)
                + "its files have changed since; `python -m vlm.data.index --rebuild` with this "
                "run's data, model and limits measures them anew",
            )


@contextmanager
def open_loader(
    dataset: "StepDataset | StreamDataset",
    start: Position,
    workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 600,
) -> Iterator[Iterator[Step]]:
    """Steps from `start` on, epoch after epoch without end. Any position starts at once.

    Args:
        workers: processes that read ahead, two steps each; with 0 nothing is read ahead.
        timeout: seconds to wait for a step before the workers are called stuck.

    Raises (anywhere inside the `with` block):
        DataWorkerError: a worker died or is stuck, or a shard of a stream cannot be read. Any
            error ends the workers at once.
    """
    watch = None
    if workers:
        _allow_open_files()
        watch = Watch(workers)
        dataset = replace(dataset, watch=watch)
    before = active_children()
    steps = iter(_loader(dataset, start, workers, pin_memory, timeout if workers else 0))
    started = [child for child in active_children() if child not in before]
    message = None
    try:
        yield steps
    except BaseException as error:
        if watch:
            message = watch.end(error, started, dataset.sample_id)
        if isinstance(error, DataError):  # a shard of a stream; a worker's comes with its traceback
            message = str(error).rpartition("DataError: ")[2].strip()
        if message is None:
            raise
        raise DataWorkerError(message) from error
    else:
        if watch:
            watch.end(None, started, dataset.sample_id)
    finally:
        # A worker may have been killed with the lock of torch's own event in its hands, and torch
        # would wait for it for ever.
        steps._workers_done_event = Event()


def _loader(dataset, start, workers, pin_memory, timeout) -> DataLoader:
    return DataLoader(
        **dataset.loading(start),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin_memory,
        timeout=timeout,
        worker_init_fn=partial(_begin, dataset.watch) if workers else None,
        multiprocessing_context="fork" if workers else None,
    )


@dataclass(frozen=True)
class _Positions:
    plan: Plan
    start: Position

    def __iter__(self) -> Iterator[Position]:
        for epoch in count(self.start.epoch):
            first = self.start.batch if epoch == self.start.epoch else 0
            for batch in range(first, self.plan.steps_per_epoch):
                yield Position(epoch, batch)


def _allow_open_files() -> None:
    """A worker hands over each tensor of a step as an open file; the usual 1,024 are few."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _begin(watch: Watch, worker: int) -> None:
    torch.set_num_threads(1)  # workers share the machine with the trainer
    for number in (signal.SIGTERM, signal.SIGUSR1):  # launchers send them to all processes, but
        signal.signal(number, signal.SIG_IGN)  # the trainer needs data until it has saved
    watch.enter(worker)

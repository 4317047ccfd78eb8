"""Dataset and DataLoader over a plan: one item is one rank's part of one optimiser step."""

import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset

from vlm.batch import Batch
from vlm.data.collate import collate
from vlm.data.index import Index
from vlm.data.ledger import Entry
from vlm.data.plan import Position, arrange, batches_per_epoch, global_batch
from vlm.data.processor import Example, Processor
from vlm.data.schema import BadSample


@dataclass(frozen=True)
class Step:
    """One rank's micro-batches of one optimiser step."""

    position: Position
    micro_batches: list[Batch]
    bad: list[Entry]
    """Samples found bad at decoding, which the micro-batches lack."""
    flops: float
    """Useful FLOPs of the samples, by the index."""

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
        return sum(len(batch.targets) for batch in self.micro_batches)

    def pin_memory(self) -> "Step":
        """The DataLoader's hook: pinned, so that the copy to the device is asynchronous."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


@dataclass(frozen=True)
class StepDataset(Dataset):
    """Position -> Step, for one rank. The order of everything is the plan's."""

    index: Index
    processor: Processor
    global_batch_size: int
    per_device_batch: int
    seed: int
    rank: int
    world: int

    def __getitem__(self, position: Position) -> Step:
        numbers = global_batch(len(self.index), self.global_batch_size, self.seed, position)
        ranks = arrange(self.index.cost[numbers], self.world, self.per_device_batch)
        bad: list[Entry] = []
        micro_batches = []
        for places in ranks[self.rank]:
            examples = [self._example(int(numbers[place]), bad) for place in places]
            good = [example for example in examples if example is not None]
            micro_batches.append(collate(good, self.processor.config))
        mine = [place for places in ranks[self.rank] for place in places]
        flops = float(self.index.cost[numbers[mine]].sum())
        return Step(position, micro_batches, bad, flops)

    def _example(self, number: int, bad: list[Entry]) -> Example | None:
        try:
            return self.processor.encode(self.index.sample(number))
        except BadSample as error:
            bad.append(Entry(error.sample_id, error.reason, "decoding"))
            return None

    def costliest(self) -> Batch:
        """The micro-batch that takes most memory: the costliest samples of the data together."""
        order = self.index.cost.argsort(kind="stable")[::-1]
        chosen: list[Example] = []
        for number in order:
            example = self._example(int(number), [])
            if example is not None:
                chosen.append(example)
            if len(chosen) == self.per_device_batch:
                break
        return collate(chosen, self.processor.config)


def make_loader(
    dataset: StepDataset, start: Position, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Steps from `start` on, epoch after epoch without end. Any position starts at once."""
    if workers:
        _allow_open_files()
    return DataLoader(
        dataset,
        sampler=_Positions(dataset, start),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        multiprocessing_context="fork" if workers else None,
    )


@dataclass(frozen=True)
class _Positions:
    dataset: StepDataset
    start: Position

    def __iter__(self) -> Iterator[Position]:
        size = batches_per_epoch(len(self.dataset.index), self.dataset.global_batch_size)
        for epoch in count(self.start.epoch):
            first = self.start.batch if epoch == self.start.epoch else 0
            for batch in range(first, size):
                yield Position(epoch, batch)


def _allow_open_files() -> None:
    """A worker hands over each tensor of a step as an open file; the usual 1,024 are few."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _one_thread(_worker: int) -> None:
    """Workers share the machine with the trainer."""
    torch.set_num_threads(1)

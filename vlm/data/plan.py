"""The epoch as a pure function of (sizes, seed, world): samples -> steps -> ranks -> micro-batches.

    epoch_order ──> global batch ──> arrange ──> micro-batches of each rank
    (seed, epoch)   (fixed size)     (vlm/data/pack.py)

The sequence of global batches never depends on the number of ranks, nor on how they are packed;
only their arrangement does, and that changes no gradient, since the loss is a sum over the whole
global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vlm.data.pack import Budget, arrange


@dataclass(frozen=True)
class Position:
    """A place in the run: which global batch comes next."""

    epoch: int
    batch: int
    shard: int = 0
    row: int = 0
    """Of a stream: place of the shard in the epoch's order, and its row, where the window begins
    that the batch is of. 0 in indexed data."""


@dataclass(frozen=True)
class Plan:
    """What fixes every step of a run. Legend: n samples, s sources."""

    lengths: np.ndarray
    """(n,) tokens."""
    patches: np.ndarray
    """(n,)"""
    targets: np.ndarray
    """(n,) learnt tokens."""
    costs: np.ndarray
    """(n,) float64: useful FLOPs."""
    counts: tuple[int, ...]
    """(s,) samples of each source; the samples of a source lie one after the other."""
    weights: tuple[float, ...]
    """(s,) how many times the samples of each source come in an epoch."""
    global_batch_size: int
    seed: int
    world: int
    budget: Budget
    later_costs: np.ndarray | None = None
    """(n,) float64: FLOPs that the second epoch and later ones really take, where `feature_cache`
    saves some. Ranks are balanced by them. None where they are the useful ones."""
    skips_text: bool = False
    """Leave out samples without an image or video, which train neither tower nor merger. Their
    targets still count."""

    @property
    def epoch_samples(self) -> int:
        return sum(map(sum, _shares(self.counts, self.weights)))

    @property
    def steps_per_epoch(self) -> int:
        """The last global batch of an epoch may be smaller; it is kept."""
        return -(-self.epoch_samples // self.global_batch_size)

    def samples(self, position: Position) -> np.ndarray:
        """(at most global_batch_size,) int64: numbers of the samples of one optimiser step."""
        order = epoch_order(self.counts, self.weights, self.seed, position.epoch)
        start = position.batch * self.global_batch_size
        return order[start : start + self.global_batch_size]

    def skipped_targets(self, position: Position) -> int:
        """Targets of the step's samples that are left out."""
        samples = self.samples(position)
        return int(self.targets[samples][self._is_skipped(samples)].sum())

    def ranks(self, position: Position) -> list[list[list[int]]]:
        """Numbers of a step's samples: [rank][micro-batch][sample]."""
        samples = self.samples(position)
        samples = samples[~self._is_skipped(samples)]
        costs = self.balanced_costs(position.epoch)[samples]
        sizes = self.lengths[samples], self.patches[samples]
        places = arrange(costs, *sizes, self.world, self.budget)
        return [[samples[micro].tolist() for micro in rank] for rank in places]

    def balanced_costs(self, epoch: int) -> np.ndarray:
        """(n,) float64: what ranks are balanced by in an epoch."""
        return self.costs if epoch == 0 or self.later_costs is None else self.later_costs

    def costliest(self) -> list[int]:
        """Samples, most wanted first, that together take at least the memory of any micro-batch
        of any epoch.

        In mode `samples` the costliest ones. Packed, those that fill both budgets at once as far
        as the data can: most patches first, then most tokens. That is a bound, found without
        planning the epoch; a sample above a budget goes alone, where it is larger still.
        """
        everyone = np.arange(len(self.lengths))
        kept = everyone[~self._is_skipped(everyone)]
        if self.budget.mode == "samples":
            order = np.argsort(-self.costs[kept], kind="stable")
            return kept[order[: self.budget.samples]].tolist()
        sizes, limits = self.budget.sizes(self.lengths, self.patches)
        chosen, room = [], limits.copy()
        for column in (1, 0):
            order = kept[np.argsort(-sizes[kept, column], kind="stable")]
            order = order[~np.isin(order, chosen)]
            while len(chosen) < self.global_batch_size:
                fits = (sizes[order] <= room).all(axis=1)
                if not fits.any():
                    break
                chosen.append(int(order[fits.argmax()]))
                room -= sizes[chosen[-1]]
                order = order[order != chosen[-1]]
        shares = (sizes / limits).sum(axis=1)
        largest = int(kept[shares[kept].argmax()])
        if (sizes[largest] > limits).any() and shares[largest] > shares[chosen].sum():
            return [largest]
        return chosen

    def _is_skipped(self, samples: np.ndarray) -> np.ndarray:
        return (self.patches[samples] == 0) & self.skips_text


@lru_cache(maxsize=2)
def epoch_order(
    counts: tuple[int, ...], weights: tuple[float, ...], seed: int, epoch: int
) -> np.ndarray:
    """(epoch_samples,) int64, read-only: the seeded order of an epoch.

    A source of weight 2.5 has its samples twice, and half of them, chosen anew in every epoch,
    a third time.
    """
    rng = np.random.default_rng((seed, epoch))
    parts, first = [], 0
    for count, (whole, rest) in zip(counts, _shares(counts, weights), strict=True):
        numbers = np.arange(first, first + count)
        parts.append(np.tile(numbers, whole // max(count, 1)))
        if rest:
            parts.append(rng.permutation(numbers)[:rest])
        first += count
    order = rng.permutation(np.concatenate(parts))
    order.flags.writeable = False
    return order


def _shares(counts: Sequence[int], weights: Sequence[float]) -> list[tuple[int, int]]:
    """Samples that a source gives to an epoch: in whole rounds, and in the broken one."""
    return [
        (int(weight) * count, round((weight - int(weight)) * count))
        for count, weight in zip(counts, weights, strict=True)
    ]

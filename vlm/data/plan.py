"""The epoch as a pure function of (costs, seed, world): samples -> steps -> ranks -> micro-batches.

    epoch_order ──> global_batch ──> arrange ──> micro-batches of each rank
    (seed, epoch)   (fixed size)     (costs, world)

The sequence of global batches never depends on the number of ranks; only their arrangement
does, and that changes no gradient, since the loss is a sum over the whole global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Position:
    """A place in the run: which global batch comes next."""

    epoch: int
    batch: int


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """(samples,) int64: the seeded order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(samples)


def batches_per_epoch(samples: int, global_batch_size: int) -> int:
    """The last batch of an epoch may be smaller; it is kept."""
    return -(-samples // global_batch_size)


def global_batch(samples: int, global_batch_size: int, seed: int, position: Position) -> np.ndarray:
    """Numbers of the samples of one optimiser step."""
    order = epoch_order(samples, seed, position.epoch)
    start = position.batch * global_batch_size
    return order[start : start + global_batch_size]


def arrange(costs: Sequence[float], world: int, per_device_batch: int) -> list[list[list[int]]]:
    """Places of a global batch's samples: [rank][micro-batch][sample].

    Every rank gets the same number of micro-batches of at most `per_device_batch` samples
    (some may be empty). Samples go from the costliest to the cheapest, each to the rank with
    the least work so far (longest processing time first, Graham 1969), then likewise to that
    rank's micro-batches.
    """
    micro_batches = -(-len(costs) // (world * per_device_batch))
    ranks = _spread(range(len(costs)), costs, world, micro_batches * per_device_batch)
    return [_spread(rank, costs, micro_batches, per_device_batch) for rank in ranks]


def _spread(
    items: Sequence[int], costs: Sequence[float], bins: int, capacity: int
) -> list[list[int]]:
    """Items over bins of at most `capacity`, balanced by cost; ties go to the first."""
    loads, contents = [0.0] * bins, [[] for _ in range(bins)]
    for item in sorted(items, key=lambda item: (-costs[item], item)):
        open_bins = [b for b in range(bins) if len(contents[b]) < capacity]
        lightest = min(open_bins, key=lambda b: (loads[b], len(contents[b]), b))
        contents[lightest].append(item)
        loads[lightest] += costs[item]
    return contents

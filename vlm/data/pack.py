"""A global batch onto ranks and into micro-batches: nothing is lost, ranks wait for nobody.

    costs, sizes ──> fewest micro-batches ──> longest first ──> swaps ──> [rank][micro-batch][place]

Ranks meet in every micro-batch (ZeRO-2 reduces gradients there), so it is the j-th micro-batches
of all ranks that must cost the same. They are called a level here.

Legend: n samples, k budgets, W ranks, M micro-batches a rank; a bin is one micro-batch of one rank.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Mode = Literal["packed", "samples"]
CLOSE = 1000
"""A level is even where its costliest bin is within one part in this many of the mean."""
ROUNDS, PATIENCE = 40, 4
"""Most rounds of swaps, and of such that do not lighten the heaviest bin."""
WHOLE = 1 << 40
"""Costs become whole numbers, the largest this one, so that every machine adds up the same."""


@dataclass(frozen=True)
class Budget:
    """What a micro-batch may hold."""

    mode: Mode = "packed"
    samples: int = 2
    """In mode `samples`: a fixed number, as without packing."""
    tokens: int = 8192
    patches: int = 20480
    """In mode `packed`. A sample that is larger has a micro-batch of its own."""

    def sizes(self, lengths: np.ndarray, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, k) int64: what each sample takes of each budget; and the (k,) budgets."""
        if self.mode == "samples":
            return np.ones((len(lengths), 1), np.int64), np.array([self.samples])
        sizes = np.stack([lengths, patches], axis=1).astype(np.int64)
        return sizes, np.array([self.tokens, self.patches])


def arrange(
    costs: np.ndarray, lengths: np.ndarray, patches: np.ndarray, world: int, budget: Budget
) -> list[list[list[int]]]:
    """Places of a global batch's samples: [rank][micro-batch][sample].

    Every rank gets the same number of micro-batches (some may be empty): the fewest into which
    the samples go, longest first or best fit. Within them samples are placed by cost, longest
    processing time first (Graham 1969); then pairs of micro-batches swap samples until the ranks
    of each level are even.

    Args:
        costs: (n,) FLOPs; lengths: (n,) tokens; patches: (n,).
    """
    sizes, limits = budget.sizes(lengths, patches)
    sizes[(sizes > limits).any(axis=1)] = limits
    largest = float(np.max(costs, initial=1.0))
    work = np.rint(np.asarray(costs) * (WHOLE / largest)).astype(np.int64)
    count = fewest(sizes, limits, world)
    while True:
        bins = _longest_first(work, sizes, limits, world, count)
        bins = bins or _best_fit(sizes, limits, world * count)
        if bins:
            return _onto_ranks(_level(bins, work, sizes, limits, world), work, world)
        count += 1


def fewest(sizes: np.ndarray, limits: np.ndarray, world: int) -> int:
    """Micro-batches a rank below which samples of `sizes` (n, k) cannot go; 1 without any."""
    return max(1, int((-(-sizes.sum(axis=0) // (limits * world))).max()))


def _longest_first(work, sizes, limits, world: int, count: int) -> list[list[int]] | None:
    """Bins (level by level) filled from the costliest sample on, each sample into the bin that
    lacks most; None where one finds no room."""
    order = np.argsort(-work, kind="stable").tolist()
    costs, needs = work.tolist(), sizes.tolist()
    goals = _goals([costs[place] for place in order[::world]], sum(costs) // world, count)
    room = [limits.tolist() for _ in range(world * count)]
    bins: list[list[int]] = [[] for _ in room]
    heap = [(-goals[number // world], number) for number in range(world * count)]
    heapq.heapify(heap)
    for place in order:
        need, passed = needs[place], []
        while heap:
            lack, number = heap[0]
            if all(n <= r for n, r in zip(need, room[number], strict=True)):
                break
            passed.append(heapq.heappop(heap))
        if not heap:
            return None
        heapq.heapreplace(heap, (lack + costs[place], number))
        for entry in passed:
            heapq.heappush(heap, entry)
        bins[number].append(place)
        room[number] = [r - n for r, n in zip(room[number], need, strict=True)]
    return bins


def _goals(seeds: Sequence[int], total: int, count: int) -> list[int]:
    """Cost that each level's bins should have: an even share of what is left of `total`, but no
    less than the level's largest sample, so that a heavy one stands among equals."""
    goals = []
    for level in range(count):
        seed = seeds[level] if level < len(seeds) else 0
        goals.append(max(total // (count - level), seed))
        total = max(0, total - goals[-1])
    return goals


def _best_fit(sizes, limits, count: int) -> list[list[int]] | None:
    """Bins filled from the largest sample on, each into the fullest that has room: packs tighter
    than `_longest_first`, but pays no heed to cost."""
    shares = sizes / limits
    room = np.tile(limits, (count, 1))
    bins: list[list[int]] = [[] for _ in range(count)]
    for place in np.argsort(-shares.max(axis=1), kind="stable").tolist():
        left = room - sizes[place]
        free = np.where((left >= 0).all(axis=1), (left / limits).sum(axis=1), np.inf)
        number = int(free.argmin())
        if free[number] == np.inf:
            return None
        bins[number].append(place)
        room[number] = left[number]
    return bins


def _level(bins, work, sizes, limits, world: int) -> list[list[list[int]]]:
    """[level][bin]: bins of like cost together, then made more alike by swaps."""
    order = sorted(range(len(bins)), key=lambda number: -int(work[bins[number]].sum()))
    levels = []
    for start in range(0, len(bins), world):
        level = [np.array(bins[number], np.int64) for number in order[start : start + world]]
        levels.append(_even_out(level, work, sizes, limits))
    return levels


def _even_out(level: list[np.ndarray], work, sizes, limits) -> list[np.ndarray]:
    """Rounds in which the heaviest bins meet the lightest, with other partners in each round.

    What counts is the heaviest, for which all wait; rounds end when it stays as it is.
    """
    loads = [int(work[content].sum()) for content in level]
    enough = sum(loads) * (CLOSE + 1) // (CLOSE * len(level))
    half, best, idle = len(level) // 2, max(loads), 0
    for turn in range(ROUNDS):
        if best <= enough or idle == PATIENCE or not half:
            break
        order = sorted(range(len(level)), key=lambda number: -loads[number])
        lightest = order[: -half - 1 : -1]
        shift = turn % half
        for heavy, light in zip(order, lightest[shift:] + lightest[:shift], strict=False):
            if loads[heavy] <= enough:
                break
            apart = loads[heavy] - loads[light]
            moved = _swap(level, heavy, light, apart, work, sizes, limits)
            loads[heavy] -= moved
            loads[light] += moved
        idle = 0 if max(loads) < best else idle + 1
        best = max(loads)
    return level


def _swap(level, heavy: int, light: int, apart: int, work, sizes, limits) -> int:
    """The move or swap that leaves two bins most alike, done; returns the cost that moved."""
    a, b = level[heavy], level[light]
    # the last column gives nothing back: a move
    change = work[a][:, None] - np.append(work[b], 0)
    growth = sizes[a][:, None] - np.vstack([sizes[b], np.zeros_like(limits)])  # of the light bin
    fits = (growth <= limits - sizes[b].sum(axis=0)).all(axis=-1)
    fits &= (-growth <= limits - sizes[a].sum(axis=0)).all(axis=-1)
    left = np.where(fits, np.abs(apart - 2 * change), apart)
    row, column = divmod(int(left.argmin()), len(b) + 1)
    if left[row, column] >= apart:
        return 0
    level[heavy] = np.append(np.delete(a, row), b[column : column + 1])
    level[light] = np.append(np.delete(b, column) if column < len(b) else b, a[row])
    return int(change[row, column])


def _onto_ranks(levels, work, world: int) -> list[list[list[int]]]:
    """Each level's heaviest bin goes to the rank with the least so far."""
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    loads = [0] * world
    for level in levels:
        costs = [int(work[content].sum()) for content in level]
        heaviest_first = sorted(range(world), key=lambda number: -costs[number])
        idlest_first = sorted(range(world), key=loads.__getitem__)
        for number, rank in zip(heaviest_first, idlest_first, strict=True):
            ranks[rank].append(sorted(level[number].tolist()))
            loads[rank] += costs[number]
    return ranks

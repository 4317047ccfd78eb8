"""The epoch is a pure function; arranging a batch loses nothing and balances the ranks."""

import numpy as np
import pytest

from vlm.data.plan import Position, arrange, batches_per_epoch, epoch_order, global_batch


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own():
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], epoch_order(1000, 0, 0))


@pytest.mark.parametrize(("samples", "size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_global_batches_cover_the_epoch_and_keep_the_last(samples, size):
    count = batches_per_epoch(samples, size)
    batches = [global_batch(samples, size, 7, Position(2, b)) for b in range(count)]
    assert np.array_equal(np.concatenate(batches), epoch_order(samples, 7, 2))
    assert [len(batch) for batch in batches[:-1]] == [size] * (count - 1)
    assert 1 <= len(batches[-1]) <= size


def test_arranging_keeps_every_sample_and_the_ranks_in_step():
    rng = np.random.default_rng(0)
    for _ in range(300):
        world, per_device = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        costs = rng.lognormal(0, 1.5, int(rng.integers(1, 60)))
        ranks = arrange(costs, world, per_device)
        assert ranks == arrange(costs, world, per_device)
        assert len(ranks) == world
        assert len({len(rank) for rank in ranks}) == 1, "unequal numbers of micro-batches"
        micro_batches = [micro for rank in ranks for micro in rank]
        assert max(map(len, micro_batches)) <= per_device
        placed = [place for micro in micro_batches for place in micro]
        assert sorted(placed) == list(range(len(costs)))
        fewest = -(-len(costs) // (world * per_device))
        assert len(ranks[0]) == fewest, "more micro-batches than needed"


def test_ranks_are_balanced_by_cost():
    """Random costs: far nearer to even than samples dealt out in turn.

    Here every rank is full, so a fixed number of samples per micro-batch bounds the balance.
    """
    rng = np.random.default_rng(1)
    ours, dealt = [], []
    for _ in range(50):
        costs = rng.lognormal(0, 1, 128)
        loads = [sum(costs[p] for micro in rank for p in micro) for rank in arrange(costs, 8, 2)]
        ours.append(np.mean(loads) / max(loads))
        dealt.append(costs.sum() / 8 / max(costs[rank::8].sum() for rank in range(8)))
    assert np.mean(ours) > 0.95
    assert np.mean(ours) > np.mean(dealt) + 0.1


def test_longest_first_on_a_case_by_hand():
    ranks = arrange([7, 1, 5, 3, 4], world=2, per_device_batch=3)
    assert [sorted(place for micro in rank for place in micro) for rank in ranks] == [
        [0, 3],
        [1, 2, 4],
    ]


def test_fewer_samples_than_ranks_leave_empty_micro_batches():
    assert arrange([1.0, 2.0], world=4, per_device_batch=2) == [[[1]], [[0]], [[]], [[]]]

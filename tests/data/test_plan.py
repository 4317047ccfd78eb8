"""The epoch is a pure function: which samples make a step never depends on the ranks."""

from dataclasses import replace

import numpy as np
import pytest

from vlm.data.pack import Budget
from vlm.data.plan import Plan, Position, epoch_order
from vlm.data.plan_report import report, summarise


def make_plan(count=100, size=16, world=2, budget=None, **options) -> Plan:
    """Ragged samples, a quarter of them text alone."""
    rng = np.random.default_rng(3)
    patches = 4 * rng.integers(1, 20, count) * (rng.random(count) < 0.75)
    lengths = patches // 4 + rng.integers(3, 40, count)
    values = {"counts": (count,), "weights": (1.0,)} | options
    return Plan(
        lengths=lengths,
        patches=patches,
        targets=np.maximum(1, lengths // 3),
        costs=lengths * 2.0 + patches,
        global_batch_size=size,
        seed=7,
        world=world,
        budget=budget or Budget(tokens=120, patches=200),
        **values,
    )


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own():
    orders = [epoch_order((1000,), (1.0,), seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], np.random.default_rng((0, 0)).permutation(1000))


def test_a_weight_is_how_often_a_sources_samples_come():
    """Three sources: half of the first, all of the second, the third two and a half times."""
    counts, weights = (40, 10, 20), (0.5, 1.0, 2.5)
    plan = make_plan(70, counts=counts, weights=weights)
    assert plan.epoch_samples == 20 + 10 + 50
    halves = []
    for epoch in range(3):
        times = np.bincount(epoch_order(counts, weights, 7, epoch), minlength=70)
        assert sorted(times[:40].tolist()) == [0] * 20 + [1] * 20
        assert times[40:50].tolist() == [1] * 10
        assert sorted(times[50:].tolist()) == [2] * 10 + [3] * 10
        halves.append(tuple(times))
    assert len(set(halves)) == 3, "the half is chosen anew"
    left_out = np.bincount(epoch_order((4, 4), (0.0, 1.0), 7, 0), minlength=8)
    assert left_out.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("samples", "size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_global_batches_cover_the_epoch_and_keep_the_last(samples, size):
    plan = make_plan(samples, size)
    batches = [plan.samples(Position(2, b)) for b in range(plan.steps_per_epoch)]
    assert np.array_equal(np.concatenate(batches), epoch_order((samples,), (1.0,), 7, 2))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= size


@pytest.mark.parametrize("mode", ["packed", "samples"])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(mode, world):
    plan = make_plan(world=world, budget=Budget(mode, 2, 120, 200), weights=(1.5,))
    alone = replace(plan, world=1, budget=Budget())
    for batch in range(plan.steps_per_epoch):
        position = Position(1, batch)
        placed = [n for rank in plan.ranks(position) for micro in rank for n in micro]
        assert sorted(placed) == sorted(alone.samples(position).tolist())


def test_later_epochs_are_balanced_by_what_they_take():
    """The first by useful FLOPs. The sequence of global batches stays."""
    plan = make_plan(400, 64, 4, Budget(tokens=300, patches=500))
    towers = plan.patches * 8.0
    useful = replace(plan, costs=plan.costs + towers)
    cached = replace(useful, later_costs=plan.costs)
    for position in (Position(0, 1), Position(1, 1), Position(2, 0)):
        assert np.array_equal(cached.samples(position), useful.samples(position))
        alone = useful if position.epoch == 0 else plan
        assert cached.ranks(position) == alone.ranks(position)
    assert cached.ranks(Position(1, 1)) != useful.ranks(Position(1, 1))
    assert report(cached, epoch=1) == report(plan, epoch=1)
    ignored = replace(cached, later_costs=None)
    steps = [ignored.ranks(Position(1, batch)) for batch in range(ignored.steps_per_epoch)]
    assert summarise(plan, steps).waiting > 3 * report(cached, epoch=1).waiting


def test_text_that_trains_nothing_is_left_out_and_still_counts():
    plan = make_plan(skips_text=True)
    everything = replace(plan, skips_text=False)
    for batch in range(plan.steps_per_epoch):
        position = Position(0, batch)
        kept = [n for rank in plan.ranks(position) for micro in rank for n in micro]
        samples = everything.samples(position)
        assert sorted(kept) == sorted(n for n in samples if plan.patches[n])
        all_targets = plan.targets[samples].sum()
        assert plan.targets[kept].sum() + plan.skipped_targets(position) == all_targets
        assert everything.skipped_targets(position) == 0
    assert plan.skipped_targets(Position(0, 0)) > 0


def test_the_costliest_micro_batch_fills_both_budgets():
    """No micro-batch of two epochs takes more of either; it holds no sample twice."""
    plan = make_plan(400, 64)
    chosen = plan.costliest()
    assert len(set(chosen)) == len(chosen)
    tokens, patches = plan.lengths[chosen].sum(), plan.patches[chosen].sum()
    assert tokens <= 120 and patches <= 200
    shares = [
        plan.lengths[micro].sum() / 120 + plan.patches[micro].sum() / 200
        for epoch in range(2)
        for batch in range(plan.steps_per_epoch)
        for rank in plan.ranks(Position(epoch, batch))
        for micro in rank
    ]
    assert tokens / 120 + patches / 200 >= max(shares) - 0.05
    alone = replace(plan, budget=Budget(tokens=120, patches=40)).costliest()
    assert alone == [int((plan.lengths / 120 + plan.patches / 40).argmax())]
    fixed = replace(plan, budget=Budget("samples", 3))
    assert sorted(plan.costs[fixed.costliest()]) == sorted(plan.costs)[-3:]
    images = replace(plan, skips_text=True).costliest()
    assert plan.patches[images].all()


def test_a_report_by_hand():
    """Two ranks, one step: costs 6 and 4 first, 1 and an empty micro-batch then."""
    plan = replace(
        make_plan(3, 3),
        lengths=np.array([60, 40, 50]),
        patches=np.array([0, 100, 0]),
        costs=np.array([6.0, 4.0, 1.0]),
        budget=Budget(tokens=60, patches=200),
    )
    assert sorted(map(sorted, plan.ranks(Position(0, 0)))) == [[[], [0]], [[1], [2]]]
    figures = report(plan)
    assert (figures.samples, figures.steps, figures.micro_batches) == (3, 1, 2)
    # 150 tokens in two budgets of 60 are more than one micro-batch a rank
    assert figures.fewest_micro_batches == 2
    assert report(replace(plan, budget=Budget(tokens=75, patches=200))).fewest_micro_batches == 1
    assert figures.samples_per_micro_batch == 0.75
    # an empty micro-batch is one token; three of four have a dummy image of four patches
    assert figures.fill == pytest.approx(250 / (250 + 1 + 3 * 4))
    assert figures.token_use == pytest.approx(150 / 240)
    assert figures.patch_use == pytest.approx(100 / 800)
    assert figures.balance == pytest.approx(5.5 / 6)
    assert figures.waiting == pytest.approx(1 - 5.5 / 7)
    assert "waiting 21.43%" in figures.line() and "balance" in figures.table()


def test_a_report_of_some_steps_is_near_that_of_all():
    plan = make_plan(3000, 32, skips_text=True)
    some, everything = report(plan, most_steps=20), report(plan)
    assert (some.steps, some.steps_seen, everything.steps_seen) == (94, 20, 94)
    assert some.token_use == pytest.approx(everything.token_use, rel=0.05)
    assert some.skipped == pytest.approx(everything.skipped)

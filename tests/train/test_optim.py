"""Schedules as pure functions, and the optimiser's groups."""

import math
from itertools import pairwise

import pytest
import torch

from train.config import TrainConfig
from train.freeze import Group
from train.optim import SCHEDULES, learning_rate_scale, make_optimizer, set_learning_rate

TOTAL, WARMUP = 200, 10  # warmup_ratio 0.05


def scales(kind: str, total: int = TOTAL, **options) -> list[float]:
    config = TrainConfig("model", ["data.jsonl"], "run", lr_scheduler_type=kind, **options)
    return [learning_rate_scale(step, total, config) for step in range(total)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_warm_up_rises_in_a_straight_line_to_the_full_rate(kind):
    assert scales(kind)[: WARMUP + 1] == pytest.approx([step / WARMUP for step in range(11)])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_falls_all_the_way_without_a_rise(kind):
    after = scales(kind)[WARMUP:]
    assert all(later < earlier for earlier, later in pairwise(after))
    assert 0 < after[-1] < 0.01
    half = (TOTAL - WARMUP) // 2
    assert after[half] == pytest.approx(0.5)


def test_cosine_and_linear_part_a_quarter_of_the_way():
    quarter = (TOTAL - WARMUP) // 4
    share = quarter / (TOTAL - WARMUP)
    expected = 0.5 * (1 + math.cos(math.pi * share))
    assert scales("cosine")[WARMUP + quarter] == pytest.approx(expected)
    assert scales("linear")[WARMUP + quarter] == pytest.approx(1 - share)


def test_constant_stays():
    assert set(scales("constant")[WARMUP:]) == {1.0}


def test_wsd_stays_at_the_full_rate_and_falls_at_the_end():
    after = scales("wsd", decay_ratio=0.2)[WARMUP:]
    steps = len(after) // 5
    assert set(after[:-steps]) == {1.0}
    assert after[-steps:] == pytest.approx([1 - step / steps for step in range(steps)])
    assert set(scales("wsd", decay_ratio=0.0)[WARMUP:]) == {1.0}


def test_a_number_of_warm_up_steps_goes_over_the_ratio():
    rates = scales("constant", warmup_steps=4, warmup_ratio=0.5)
    assert rates[:6] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert scales("constant", warmup_steps=0, warmup_ratio=0.5)[0] == 1.0


def test_no_warm_up_starts_at_the_full_rate():
    assert scales("cosine", warmup_ratio=0.0)[0] == 1.0


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_have_a_rate(total, kind):
    assert all(0 <= scale <= 1 for scale in scales(kind, total=total))
    assert all(0 <= scale < 1 for scale in scales(kind, total=total, warmup_steps=5))


def test_the_schedule_equals_transformers():
    transformers = pytest.importorskip("transformers")
    decay = {"num_decay_steps": (TOTAL - WARMUP) // 10, "decay_type": "linear"}
    for kind, name, options in (
        ("cosine", "cosine", None),
        ("linear", "linear", None),
        ("wsd", "warmup_stable_decay", decay),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = transformers.get_scheduler(name, optimizer, WARMUP, TOTAL, options)
        for ours in scales(kind):
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            theirs.step()


def test_groups_keep_their_own_rates_through_the_schedule():
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [
        Group("vit/decay", 1e-4, 0.1, {"a": one}),
        Group("llm/no_decay", 1e-3, 0.0, {"b": two}),
    ]
    config = TrainConfig("model", ["data.jsonl"], "run", adam_beta1=0.8, adam_epsilon=1e-6)
    optimizer = make_optimizer(groups, config)
    for scale in (0.5, 0.25, 1.0):  # a scale is of the full rate, not of the last one
        set_learning_rate(optimizer.param_groups, scale)
        assert [g["lr"] for g in optimizer.param_groups] == [1e-4 * scale, 1e-3 * scale]
    first, second = optimizer.param_groups
    assert (first["name"], first["weight_decay"], second["weight_decay"]) == ("vit/decay", 0.1, 0.0)
    assert first["betas"] == (0.8, 0.95) and first["eps"] == 1e-6

"""Budgets fill a device's memory, and no more, by the memory model's own words."""

from typing import get_args

import numpy as np
import pytest
import torch

from tests.model.full_size import EIGHT_BILLION
from tests.model.test_cost_memory import NARROW, WIDE, of_widths, peaks
from vlm.cost import PARTS
from vlm.cost.budget import GRAIN, MARGIN, fit_budget
from vlm.cost.memory import Load, peak_activations, training_state
from vlm.cost.samples import CostError
from vlm.recompute import Policy

LENGTHS, PATCHES = np.array([600, 2000, 8192]), np.array([0, 1200, 20480])
FULL = ("full", "full")


def fit(memory: float, trains=PARTS, recompute=FULL, gpus=8, share=1000, sizes=(LENGTHS, PATCHES)):
    total = 8_869_907_456
    trained = total if trains == PARTS else 47_196_416
    state = sum(training_state(total, trained, gpus, 2).values())
    return fit_budget(EIGHT_BILLION, trains, recompute, 2, state, int(memory), *sizes, share)


@pytest.mark.parametrize("recompute", [FULL, ("pointwise", "pointwise")])
@pytest.mark.parametrize("trains", [PARTS, ("aligner",)])
@pytest.mark.parametrize("memory", [139e9, 180e9])
def test_they_fill_the_memory(memory, trains, recompute):
    """A grain more would not fit."""
    found = fit(memory, trains, recompute)
    room = memory * (1 - MARGIN) - found.state
    taken = []
    for tokens in (found.budget.tokens, found.budget.tokens + GRAIN):
        load = Load(tokens, tokens, int(tokens * PATCHES.sum() / LENGTHS.sum()))
        taken.append(sum(peak_activations(EIGHT_BILLION, load, trains, recompute, 2).values()))
    assert taken[0] == found.activations <= room < taken[1]
    assert found.budget.tokens % GRAIN == 0 and found.budget.patches >= 20480


def test_less_kept_or_more_memory_is_more_tokens():
    tokens = [fit(m, ("aligner",), 2 * (p,)).budget.tokens for m, p in
              [(100e9, "pointwise"), (139e9, "pointwise"), (139e9, "full")]]  # fmt: skip
    assert tokens == sorted(set(tokens))


def test_they_are_no_larger_than_a_ranks_share_of_a_step():
    found = fit(1e13, share=2)
    assert (found.budget.tokens, found.budget.patches) == (2 * 8192, 2 * 8192 * 21680 // 10792)


def test_the_largest_sample_always_fits_a_budget_or_is_refused():
    enough = fit(60e9)
    assert enough.budget.tokens >= 8192 and enough.budget.patches >= 20480
    needed = (fit(139e9, share=1).activations + enough.state) / (1 - MARGIN)
    assert fit(needed + 10, share=1).budget == fit(139e9, share=1).budget
    with pytest.raises(CostError, match=r"8,192 tokens and 20,480 patches does not fit.*or take"):
        fit(needed - 1e6)


def test_text_alone_gives_the_blank_image_room():
    found = fit(139e9, sizes=(LENGTHS, 0 * PATCHES))
    assert found.budget.patches == 4 and found.budget.tokens > 8192


@pytest.mark.parametrize("policy", get_args(Policy))
def test_a_real_step_that_fills_them_stays_inside(policy):
    """Forward and backward on a CPU, a rank's whole memory for activations."""
    lengths, patches, memory = np.array([250]), np.array([64]), 100_000_000
    priced = of_widths(NARROW, WIDE), PARTS, (policy, policy), 4
    limits = fit_budget(*priced, 0, memory, lengths, patches, 1000).budget
    side = int(limits.patches**0.5) // 2 * 2
    targets = limits.tokens - side * side // 4
    load = Load(limits.tokens, targets, side * side)
    allocated, _ = peaks("stage2", load, policy, torch.float32, NARROW, WIDE)
    assert 0.75 * memory < allocated < memory

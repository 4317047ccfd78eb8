"""Recompute policies: the same bits in loss and gradients, less kept, nothing left behind."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import allocated
from tests.packing import make_sample, pack
from tests.tiny import hybrid
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel
from vlm.recompute import pointwise, run_block

SAMPLES = [(9, []), (5, [(1, 4, 4)]), (12, [(1, 10, 18), (1, 6, 14)]), (30, []), (2, [(1, 2, 2)])]
IMAGE, START, END = 4012, 4009, 4010
PAIRS = [("pointwise", "full"), ("full", "pointwise"), ("none", "pointwise")]
"""Policies of the ViT and of the language model."""
TRAINS = {
    "all": ("",),
    "merger": ("model.visual.merger.",),
    "last of each": ("model.visual.blocks.3.", "model.language_model.layers.2."),
    "norms": ("model.language_model.layers.1.input_layernorm.", "model.visual.blocks.0.norm2."),
    "products": (
        "model.language_model.layers.0.self_attn.v_proj.",
        "model.visual.blocks.1.mlp.down",
    ),
}


def gradients(model: VisionLanguageModel, policies, batch) -> dict[str, Tensor]:
    """Of two micro-batches added up, and their losses."""
    model.zero_grad()
    model.set_recompute(*policies)
    losses = [cross_entropy_sum(model(batch), model.head_weight, batch.targets) for _ in range(2)]
    for loss in losses:
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": torch.stack(losses).detach()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("sizes", [SAMPLES, SAMPLES[:1]], ids=["images", "text alone"])
def test_no_policy_changes_a_bit(trains, sizes, dtype):
    generator = torch.Generator().manual_seed(1)
    special = {"image": IMAGE, "start": START, "end": END}
    samples = [(*make_sample(n, grids, generator, **special), grids) for n, grids in sizes]
    model = hybrid().to(dtype)
    batch = pack(samples, model.config, IMAGE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINS[trains]))
    expected = gradients(model, ("none", "none"), batch)
    assert len(expected) > 1
    for policies in PAIRS:
        found = gradients(model, policies, batch)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found), policies


@pytest.mark.parametrize("policies", [("sometimes", "full"), ("none", "sometimes")])
def test_an_unknown_policy_is_named(policies):
    with pytest.raises(ValueError, match="'sometimes' is not one of none, pointwise, full"):
        hybrid().set_recompute(*policies)


# ---- pointwise, alone


class Block(nn.Module):
    """A product, a function that is computed again, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = pointwise(self.middle, self.first(x)).view(-1, 3)
        return self.second(rows[2:]).exp()  # which save a view of the result, and what they give

    def middle(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.silu(x) * x.exp()


def test_a_view_of_a_result_is_computed_again_too():
    block, x = Block(), torch.randn(5, 4)
    first, second = (
        torch.autograd.grad(run_block(block, policy, x).sum(), block.parameters())
        for policy in ("none", "pointwise")
    )
    assert all(map(torch.equal, first, second))


def test_it_is_computed_again_once_and_only_for_a_backward_pass():
    block, x = Block(), torch.randn(5, 4)
    run_block(block, "pointwise", x).sum().backward()
    assert block.calls == 2
    with torch.no_grad():
        run_block(block, "pointwise", x)
    assert block.calls == 3
    run_block(block.requires_grad_(False), "pointwise", x)
    assert block.calls == 4
    assert not hasattr(block.middle(x), "again")


def test_outside_of_a_block_it_is_the_function():
    result = pointwise(torch.exp, torch.ones(2, requires_grad=True))
    assert not hasattr(result, "again")


def test_the_graph_may_be_used_twice():
    block, x = Block(), torch.randn(5, 4, requires_grad=True)
    loss = run_block(block, "pointwise", x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(loss, x))


def test_a_failed_forward_pass_leaves_no_policy_behind():
    block = Block()
    with pytest.raises(RuntimeError):
        run_block(block, "pointwise", torch.randn(5, 7))
    test_outside_of_a_block_it_is_the_function()


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_is_left_when_the_loss_is_gone(backward):
    """Without a collection of garbage: a graph that held itself would fill a GPU."""
    block, x = Block(), torch.randn(5, 4)
    run_block(block, "pointwise", x).sum().backward()  # the gradients exist from here on

    def step() -> None:
        loss = run_block(block, "pointwise", x).sum()
        if backward:
            loss.backward()

    gc.disable()
    try:
        assert allocated(step)[0] == 0
    finally:
        gc.enable()

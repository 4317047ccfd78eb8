"""The chunked loss against torch's own cross entropy."""

import pytest
import torch
import torch.nn.functional as F

from vlm.loss import CHUNK_ROWS, cross_entropy, cross_entropy_sum


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradients(chunk_rows, weighted):
    hidden = torch.randn(11, 8, requires_grad=True)
    head = torch.randn(23, 8, requires_grad=True)
    targets = torch.randint(0, 23, (11,))
    weights = torch.rand(11) if weighted else None
    actual = cross_entropy_sum(hidden, head, targets, weights, chunk_rows)
    losses = F.cross_entropy(F.linear(hidden, head), targets, reduction="none")
    expected = (losses * weights).sum() if weighted else losses.sum()
    torch.testing.assert_close(actual, expected)
    total, terms, right = cross_entropy(hidden, head, targets, weights, chunk_rows)
    assert torch.equal(total, actual) and not terms.requires_grad
    assert torch.equal(right, F.linear(hidden, head).argmax(-1) == targets)
    torch.testing.assert_close(terms, losses * weights if weighted else losses)
    for ours, theirs in zip(
        torch.autograd.grad(3 * actual, (hidden, head)),
        torch.autograd.grad(3 * expected, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_right_where_the_target_has_the_largest_logit():
    head = torch.eye(4)
    right = cross_entropy(head[[0, 1, 2, 3, 0]], head, torch.tensor([0, 1, 0, 3, 2])).right
    assert right.tolist() == [True, True, False, True, False]


def test_equal_logits_are_no_mistake():
    """bfloat16 rounds neighbours to the same value; which of them argmax names is chance."""
    head = torch.eye(4)
    right = cross_entropy((head[:1] + head[2:3]).expand(3, -1), head, torch.tensor([0, 1, 2])).right
    assert right.tolist() == [True, False, True]


def test_logits_far_from_zero_are_no_overflow():
    """Their exponentials are taken below the largest."""
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4 and hidden.grad.tolist() == [[1, -1]]


def test_frozen_head_gets_no_gradient_and_no_buffer():
    hidden = torch.randn(5, 8, requires_grad=True)
    head = torch.randn(23, 8)
    cross_entropy_sum(hidden, head, torch.randint(0, 23, (5,))).backward()
    assert hidden.grad is not None and head.grad is None


def test_no_targets_is_a_zero_with_a_graph():
    hidden = torch.zeros(0, 8, requires_grad=True)
    head = torch.randn(23, 8, requires_grad=True)
    loss = cross_entropy_sum(hidden, head, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, 8) and torch.equal(head.grad, torch.zeros_like(head))


def test_a_bfloat16_gradient_of_the_head_is_rounded_once_per_chunk():
    """The figures beside CHUNK_ROWS: percent of its norm, over 8,192 targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8192, 32, generator=generator).bfloat16()
    head = (0.1 * torch.randn(500, 32, generator=generator)).bfloat16()
    targets = torch.randint(0, 500, (8192,), generator=generator)

    def gradient(dtype: torch.dtype, chunk_rows: int) -> torch.Tensor:
        weight = head.to(dtype, copy=True).requires_grad_()
        cross_entropy_sum(hidden.to(dtype), weight, targets, chunk_rows=chunk_rows).backward()
        return weight.grad.double()

    exact = gradient(torch.float32, 8192)
    rows = CHUNK_ROWS, 2048, 8192
    errors = [(gradient(torch.bfloat16, n) - exact).norm() / exact.norm() for n in rows]
    assert [100 * float(error) for error in errors] == pytest.approx([0.36, 0.28, 0.2], abs=0.02)


def test_bfloat16_takes_logits_to_float32():
    hidden, head = torch.randn(6, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(0, 50, (6,))
    expected = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")
    actual = cross_entropy_sum(hidden, head, targets)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)

"""Packed attention against one segment at a time."""

import pytest
import torch

from vlm.attention import varlen_attention
from vlm.batch import Segments

RAGGED = [(7,), (4, 4, 4), (3, 9, 3, 1), (5, 2, 5, 2, 8), (2, 2, 6, 6)]


def naive(q, k, v, lengths, causal):
    """Softmax written out, one segment and one head at a time."""
    out, start = torch.zeros_like(q), 0
    group = q.shape[1] // k.shape[1]
    for length in lengths:
        rows = slice(start, start + length)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // group].T / q.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            out[rows, head] = scores.softmax(-1) @ v[rows, head // group]
        start += length
    return out


@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_one_segment_at_a_time(lengths, causal, kv_heads):
    total = sum(lengths)
    q = torch.randn(total, 4, 8, requires_grad=True)
    k, v = (torch.randn(total, kv_heads, 8, requires_grad=True) for _ in range(2))
    seed = torch.randn(total, 4, 8)
    actual = varlen_attention(q, k, v, Segments.of(lengths), causal)
    expected = naive(q, k, v, lengths, causal)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (q, k, v), seed),
        torch.autograd.grad(expected, (q, k, v), seed),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_cuda_backends_equal_the_cpu(causal):
    from vlm.attention import backend

    lengths = (5, 130, 64, 1)
    q = torch.randn(sum(lengths), 8, 64)
    k, v = (torch.randn(sum(lengths), 2, 64) for _ in range(2))
    expected = varlen_attention(q, k, v, Segments.of(lengths), causal)
    moved = (x.cuda().bfloat16() for x in (q, k, v))
    assert backend("cuda", torch.bfloat16) != "sdpa"
    actual = varlen_attention(*moved, Segments.of(lengths).to("cuda"), causal)
    torch.testing.assert_close(actual.float().cpu(), expected, atol=2e-2, rtol=2e-2)

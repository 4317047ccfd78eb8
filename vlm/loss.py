"""The loss: cross entropy summed over target tokens.

The caller divides by the target count of the whole global batch, so that neither packing, nor
accumulation, nor the number of ranks changes a gradient. Change the loss here.

Legend: N target tokens, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 2048
"""Rows whose logits exist at once: 2048 x 151,936 float32 logits are 1.2 GiB."""


class Loss(NamedTuple):
    sum: Tensor
    """() float32. With N = 0 a zero that still has a graph."""
    terms: Tensor
    """(N,) float32: what it is the sum of, without a graph; for the log."""
    right: Tensor
    """(N,) bool: the target has the largest logit."""


def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Loss:
    """Sum over targets of weight * -log softmax(hidden @ head_weight.T)[target], and its terms.

    Never holds more than `chunk_rows` rows of logits: both gradients are computed in the
    forward pass, chunk by chunk, as in Liger-Kernel (arXiv:2410.10989).

    Args:
        hidden: (N, D); head_weight: (V, D), same dtype; logits are taken to float32.
        targets: (N,) int64; weights: (N,) float32 or None for ones.
    """
    return Loss(*_ChunkedCrossEntropy.apply(hidden, head_weight, targets, weights, chunk_rows))


def cross_entropy_sum(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """The sum alone."""
    return cross_entropy(hidden, head_weight, targets, weights, chunk_rows).sum


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, targets, weights, chunk_rows):
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        terms = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        right = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head_weight) if needs_head else None
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            target = targets[rows, None]
            logits = F.linear(hidden[rows], head_weight).float()
            log_sums = logits.logsumexp(-1, keepdim=True)
            losses = log_sums - logits.gather(1, target)
            scale = torch.ones_like(losses) if weights is None else weights[rows, None]
            weighed = losses * scale
            total += weighed.sum()
            terms[rows] = weighed[:, 0]
            right[rows] = logits.argmax(-1) == targets[rows]
            if not (needs_hidden or needs_head):
                continue
            grad = logits.sub_(log_sums).exp_()  # softmax, in the logits' memory
            grad.scatter_add_(1, target, -torch.ones_like(losses)).mul_(scale)
            grad = grad.to(hidden.dtype)
            if needs_hidden:
                grad_hidden[rows] = grad @ head_weight
            if needs_head:
                grad_head.addmm_(grad.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(terms, right)
        return total, terms, right

    @staticmethod
    def backward(ctx, grad_output, _grad_terms, _grad_right):
        grads = (None if g is None else g * grad_output for g in ctx.saved_tensors)
        return *grads, None, None, None

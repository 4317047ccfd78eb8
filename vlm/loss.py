"""The loss: cross entropy summed over target tokens.

The caller divides by the target count of the whole global batch, so that neither packing, nor
accumulation, nor the number of ranks changes a gradient. Change the loss here.

Legend: N target tokens, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 1024
"""Most rows whose logits exist at once: of 151,936 logits each, 622 MB in float32 and, where the
head is bfloat16, 311 MB of copies.

A bfloat16 gradient of the head is rounded once per chunk: an error of 0.36 % of its norm over 8,192
targets, where 2,048 rows have 0.28 %, and a single chunk 0.2 %. With 2,048 rows the loss would need
1.87 GB, beyond the 1.3 GB that it is to stay below."""


class Loss(NamedTuple):
    sum: Tensor
    """() float32. With N = 0 a zero that still has a graph."""
    terms: Tensor
    """(N,) float32: what it is the sum of, without a graph; for the log."""
    right: Tensor
    """(N,) bool: no logit is larger than the target's (equal ones are frequent in bfloat16)."""


def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Loss:
    """Sum over targets of weight * -log softmax(hidden @ head_weight.T)[target], and its terms.

    Never holds more than `chunk_rows` rows of logits: both gradients are computed in the
    forward pass, chunk by chunk, as in Liger-Kernel (arXiv:2410.10989), and scaled in place in the
    backward pass, which can run once only.

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
        for rows in _even_slices(len(targets), chunk_rows):
            target = targets[rows, None]
            logits = F.linear(hidden[rows], head_weight).float()
            largest, of_target = logits.amax(-1, keepdim=True), logits.gather(1, target)
            # all in the logits' memory: exponentials, softmax, gradient
            sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
            log_sums = largest + sums.log()
            losses = log_sums - of_target
            scale = torch.ones_like(losses) if weights is None else weights[rows, None]
            weighed = losses * scale
            total += weighed.sum()
            terms[rows] = weighed[:, 0]
            right[rows] = (of_target == largest)[:, 0]
            if needs_hidden or needs_head:
                grad = logits.mul_(scale / sums).scatter_add_(1, target, -scale)
                grad = grad.to(hidden.dtype)
                del logits
                if needs_hidden:
                    torch.mm(grad, head_weight, out=grad_hidden[rows])
                if needs_head:
                    grad_head.addmm_(grad.T, hidden[rows])
                del grad  # before the next chunk's logits
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(terms, right)
        return total, terms, right

    @staticmethod
    def backward(ctx, grad_output, _grad_terms, _grad_right):
        grads = (None if g is None else g.mul_(grad_output) for g in ctx.saved_tensors)
        return *grads, None, None, None


def _even_slices(count: int, most: int) -> list[slice]:
    """As few as can be of at most `most` rows: a short last one would cost the head's gradient a
    whole pass."""
    rows = even_rows(count, most)
    return [slice(start, start + rows) for start in range(0, count, rows)]


def even_rows(count: int, most: int = CHUNK_ROWS) -> int:
    """Rows of a chunk, where `count` rows go into as few as can be of at most `most`."""
    return -(-count // max(1, -(-count // most))) or 1

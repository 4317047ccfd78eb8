"""Layers that both towers share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.recompute import pointwise


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv:1910.07467) over the last axis.

    Normalised in float32 and rounded to the input's dtype before the weight multiplies, as
    the donors' code has it: a fused kernel that rounds once differs in bfloat16.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(self._normalise, x)

    def _normalise(self, x: Tensor) -> Tensor:
        exact = x.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=bias)
        self.up_proj = nn.Linear(size, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(pointwise(_gated, self.gate_proj(x), self.up_proj(x)))


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up

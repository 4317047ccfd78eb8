"""Layers that both towers share."""

from functools import partial

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
    """Gated feed-forward layer (arXiv:2002.05202): down(silu(gate(x)) * up(x)).

    On a GPU a hidden width that is no multiple of 8 (3420, of the donors' ViT) is computed as a
    wider one, since such matrices miss the tensor cores' fast path. Padded are the weights' copies
    of each forward pass and not the parameters: so neither checkpoints nor optimisers know of it,
    and the copying is about a percent of the products of 20,000 rows. Exact: silu(0) * 0 is 0.
    """

    def __init__(self, size: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=bias)
        self.up_proj = nn.Linear(size, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        extra = padding(self.down_proj.in_features, x.device.type)
        if not extra:
            return self.down_proj(pointwise(_gated, self.gate_proj(x), self.up_proj(x)))
        gate, up = (
            F.linear(x, _wider(m.weight, (0, 0, 0, extra)), _wider(m.bias, (0, extra)))
            for m in (self.gate_proj, self.up_proj)
        )
        down = _wider(self.down_proj.weight, (0, extra))
        return F.linear(pointwise(_gated, gate, up), down, self.down_proj.bias)


def padding(width: int, device_type: str) -> int:
    """Columns of zeros that a feed-forward layer of a hidden width gets on a device."""
    return -width % 128 if device_type == "cuda" and width % 8 else 0


def _wider(weight: Tensor | None, pad: tuple[int, ...]) -> Tensor | None:
    return None if weight is None else pointwise(partial(F.pad, pad=pad), weight)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up

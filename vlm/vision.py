"""Qwen2.5-VL's vision tower and the merger ("aligner") that ends it.

Patches of all images lie one after the other. Most blocks attend inside windows of
112 x 112 pixels, a few over a whole frame. Patches are put into window order once, at the
start, so that every window is a contiguous segment; the merger's rows are put back at the end.
Source: Qwen2.5-VL technical report, arXiv:2502.13923, section 2.1.

Legend: P patches, V visual tokens (P / merge_unit), D hidden size, H heads, E head_dim.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.attention import varlen_attention
from vlm.batch import Features, Segments, VisionPlan
from vlm.config import VisionConfig
from vlm.layers import RMSNorm, SwiGLU
from vlm.recompute import Policy, pointwise, run_block
from vlm.rope import apply_vision_rope, vision_tables

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's statistics of RGB levels in 0..1, which the donors were trained with."""


def plan_vision(grids: Sequence[tuple[int, int, int]], config: VisionConfig) -> VisionPlan:
    """Window order, positions and attention segments of a list of images and videos.

    Args:
        grids: (time, height, width) of each, in patches; height and width are multiples of
            `spatial_merge_size`.
    """
    merge, unit = config.spatial_merge_size, config.merge_unit
    side = config.window_size // merge // config.patch_size  # visual tokens per window side
    order, positions, windows, frames = [], [], [], []
    first = 0
    for t, h, w in grids:
        rows, columns = h // merge, w // merge
        tokens = torch.arange(rows * columns).view(rows, columns)
        cuts = [
            tokens[top : top + side, left : left + side].flatten()
            for top in range(0, rows, side)
            for left in range(0, columns, side)
        ]
        frame = torch.cat(cuts)
        for _ in range(t):
            order.append(frame + first)
            first += rows * columns
        windows += [len(cut) * unit for cut in cuts] * t
        frames += [h * w] * t
        positions.append(_patch_positions(h, w, merge).repeat(t, 1))
    window_index = torch.cat(order)
    by_token = torch.cat(positions).view(-1, unit, 2)
    return VisionPlan(
        window_index=window_index,
        reverse_index=torch.argsort(window_index),
        positions=by_token[window_index].flatten(0, 1),
        windows=Segments.of(windows),
        frames=Segments.of(frames),
    )


def _patch_positions(height: int, width: int, merge: int) -> Tensor:
    """(height * width, 2) row and column of each patch, the patches of a visual token together."""
    grid = torch.stack(
        torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1
    )
    blocks = grid.view(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


def normalise(patches: Tensor) -> Tensor:
    """(P, patch_dim) uint8 RGB levels -> float32 values of the donors' normalisation."""
    levels = patches.float().div_(255)
    channels = levels.chunk(len(IMAGE_MEAN), dim=1)
    for level, mean, std in zip(channels, IMAGE_MEAN, IMAGE_STD, strict=True):
        level.sub_(mean).div_(std)
    return levels


class VisionTower(nn.Module):
    """Patches to visual tokens in the language model's space."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Policy = "none"
        self.keep: Callable[[Features, Tensor], None] | None = None
        """Called with the trunk's output for media that are not on disk, where a batch tells."""
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(
        self, patches: Tensor, plan: VisionPlan, features: Features | None = None
    ) -> Tensor:
        """patches (P, patch_dim) uint8 -> (V, out_hidden_size), in the order of the images.

        Args: features: of media that are not among the patches.
        """
        trunk = (*self.patch_embed.parameters(), *self.blocks.parameters())
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(p.requires_grad for p in trunk)
        ):
            x = self._kept(patches, plan, features) if features else self.trunk(patches, plan)
        return run_block(self.merger, self.recompute, x)[plan.reverse_index]

    def _kept(self, patches: Tensor, plan: VisionPlan, features: Features) -> Tensor:
        """(P, D) of all media, of which only those in `patches` are computed."""
        if not len(patches):
            return features.rows
        computed = self.trunk(patches, plan)
        if self.keep:
            self.keep(features, computed)
        return features.joined(computed)

    def trunk(self, patches: Tensor, plan: VisionPlan) -> Tensor:
        """patches (P, patch_dim) uint8 -> (P, D), what the merger reads, in window order."""
        unit = self.config.merge_unit
        patches = patches.unflatten(0, (-1, unit))[plan.window_index].flatten(0, 1)
        x = self.patch_embed(patches)
        cos, sin = vision_tables(plan.positions, self.config.head_dim)
        for index, block in enumerate(self.blocks):
            full = index in self.config.fullatt_block_indexes
            segments = plan.frames if full else plan.windows
            x = run_block(block, self.recompute, x, cos, sin, segments)
        return x


class PatchEmbed(nn.Module):
    """Levels to rows: normalise, then the donors' convolution, which is a matmul.

    Not folded over the two halves in time, which of an image are equal: that is 0.1 % of the
    tower's FLOPs, and the sum of two bfloat16 weights is rounded once more (an error of 2.9e-3
    where this has 2.3e-3).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, size, size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight
        return F.linear(normalise(patches).to(weight.dtype), weight.flatten(1))


class VisionBlock(nn.Module):
    """`before` and `after` attention are pieces that `vlm/compile.py` may compile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.norm2 = RMSNorm(config.hidden_size)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        mixed = varlen_attention(*self.before(x, cos, sin), segments, causal=False)
        return self.after(x, mixed)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads, of x (P, D): q, k and v, each (P, H, E)."""
        return self.attn.queries_keys_values(self.norm1(x), cos, sin)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's result (P, D), of its input and attention's result (P, H, E)."""
        x = x + self.attn.proj(mixed.flatten(1))
        return x + self.mlp(self.norm2(x))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def queries_keys_values(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (P, H, E) each
        q, k = (pointwise(apply_vision_rope, x, cos, sin) for x in (q, k))
        return q, k, v


class PatchMerger(nn.Module):
    """Joins `merge_unit` neighbouring patches into one row of the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        joined = config.hidden_size * config.merge_unit
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(P, D) -> (V, out_hidden_size)."""
        first, gelu, second = self.mlp
        joined = self.ln_q(x).view(-1, first.in_features)
        return second(pointwise(gelu, first(joined)))

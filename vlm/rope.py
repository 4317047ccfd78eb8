"""Rotary positions: where every token and patch stands, and how that turns queries and keys.

Three kinds, all pure functions:
- M-RoPE (Qwen2-VL, arXiv:2409.12191, section 2.1): a token has a time, a row and a column;
  the first `mrope_section[0]` of its head_dim / 2 frequencies follow time, the next the row,
  the last the column (sectioned, not interleaved).
- Plain rope (RoFormer, arXiv:2104.09864), for a language model of its own. It shares no code
  with M-RoPE, so that each can be the other's witness on text, where they must agree exactly.
- The vision tower's two-dimensional rope.

Tables are float32. The decoder's are cast to the model's dtype before use and the vision
tower's are applied in float32, as in the donors' own code.

Legend: t tokens of a sample, T rows, H heads, E head_dim, P patches.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from vlm.config import TextConfig, VLMConfig


def mrope_positions(
    input_ids: Tensor,
    grids: Sequence[tuple[int, int, int]],
    config: VLMConfig,
    second_per_grid: Sequence[float] = (),
) -> Tensor:
    """M-RoPE positions of one sample.

    Text advances all three axes by one. An image or video starts where the text before it
    ended, spreads over its grid, and the text after it goes on at its largest position + 1.

    Args:
        input_ids: (t,) int64, with one placeholder token per visual token.
        grids: (time, height, width) in patches of each image or video, in order of appearance.
        second_per_grid: seconds between two temporal grid steps, one per video. Time is counted
            in float64 and cut off, as vLLM does (`qwen2_5_vl.get_mrope_input_positions`).

    Returns:
        (3, t) int64: time, height, width.

    Raises:
        ValueError: the placeholders do not match the grids, or the videos the seconds.
    """
    merge = config.vision.spatial_merge_size
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    remaining, seconds = list(grids), list(second_per_grid)
    blocks, start = [], 0
    for kind, run in groupby(input_ids.tolist(), key=lambda token: kinds.get(token)):
        length = len(list(run))
        if kind is None:
            blocks.append((torch.arange(length) + start).expand(3, -1))
            start += length
            continue
        # Two images may touch: one run of placeholders then holds several grids.
        while length > 0:
            if not remaining:
                raise ValueError(f"{length} {kind} placeholder tokens have no {kind} left")
            t, h, w = remaining.pop(0)
            h, w = h // merge, w // merge
            if t * h * w > length:
                raise ValueError(
                    f"{length} {kind} placeholder tokens, but the grid has {t * h * w}"
                )
            length -= t * h * w
            times = torch.arange(t)
            if kind == "video":
                if not seconds:
                    raise ValueError("a video has no second_per_grid")
                interval = seconds.pop(0) * config.vision.tokens_per_second
                times = (times.double() * interval).long()
            axes = times, torch.arange(h), torch.arange(w)
            block = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + start
            blocks.append(block)
            start = int(block.max()) + 1
    if remaining or seconds:
        left = len(remaining) or len(seconds)
        raise ValueError(f"{left} images or videos have no placeholder tokens")
    return torch.cat(blocks, dim=1) if blocks else torch.zeros(3, 0, dtype=torch.int64)


def mrope_tables(position_ids: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, E) float32, of M-RoPE positions (3, T)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    inverse_frequencies = 1.0 / (config.rope_theta ** (half / config.head_dim))  # (E / 2,)
    angles = position_ids[..., None].float() * inverse_frequencies  # (3, T, E / 2)
    sections = angles.split(config.mrope_section, dim=-1)
    angles = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_mrope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (T, H, E) by tables (T, E), in x's dtype."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]


def rope_tables(positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, E / 2) float32, of plain positions (T,)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / (config.rope_theta ** (exponents / config.head_dim))
    angles = torch.outer(positions.float(), frequencies)
    return torch.cos(angles), torch.sin(angles)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (T, H, E) by tables (T, E / 2), in x's dtype."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def vision_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (P, E / 2) float32, of patch rows and columns (P, 2).

    Half of the frequencies follow the row, half the column; theta is 10000.
    """
    quarter = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (10000.0 ** (quarter / (head_dim // 2)))  # (E / 4,)
    angles = (positions[..., None].float() * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def apply_vision_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (P, H, E) by tables (P, E / 2) in float32; the result has x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)

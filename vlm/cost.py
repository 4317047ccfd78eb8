"""FLOPs and parameters from the config alone.

Convention, the same wherever a figure is printed: useful FLOPs, two per multiply-add of a
matrix product; no recompute, no padding, no pointwise operation; causal attention counts the
pairs that exist; a frozen tower counts only what its gradients to others need.

Legend: a product y = x W costs 1 forward, 1 for the gradient of W, 1 for the gradient of x.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch

from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.model import VisionLanguageModel

PARTS = ("vit", "aligner", "llm")
"""What can be trained or frozen; `aligner` is the merger."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to; the merger lives under `visual.`, yet is its own."""
    if name.startswith("model.visual.merger."):
        return "aligner"
    return "vit" if name.startswith("model.visual.") else "llm"


def parameter_counts(config: VLMConfig) -> dict[str, int]:
    """Parameters of each part, tied ones once."""
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def sample_flops(
    config: VLMConfig,
    length: int,
    grids: Sequence[tuple[int, int, int]],
    targets: int,
    trains: Collection[str],
) -> float:
    """Useful FLOPs of one sample, forward and backward.

    Args:
        length: tokens; targets: tokens that are learnt.
        grids: (time, height, width) in patches of its images and videos.
        trains: which of `PARTS` train; empty for a forward pass alone.
    """
    text, vision = config.text, config.vision
    below_decoder = bool({"vit", "aligner"} & set(trains))
    passes = 1 + ("llm" in trains) + (below_decoder or "llm" in trains)
    flops = passes * (length * decoder_linear(text) + targets * head_linear(text))
    flops += (3 if passes > 1 else 1) * causal_attention(text, length)
    tower = 3 if "vit" in trains else 1
    for t, h, w in grids:
        flops += tower * t * h * w * tower_linear(vision)
        flops += tower * t * tower_attention(vision, h, w)
        # the patch embedding's input is pixels: no gradient of x
        flops += min(tower, 2) * t * h * w * 2 * vision.patch_dim * vision.hidden_size
        visual = t * h * w // vision.merge_unit
        first, second = merger_linear(vision)
        below, own = "vit" in trains, "aligner" in trains
        flops += visual * (first * (1 + own + below) + second * (1 + own + (own or below)))
    return float(flops)


def decoder_linear(text: TextConfig) -> int:
    """Forward FLOPs per token of all layers' linear maps."""
    heads = text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    layer = text.hidden_size * heads + 3 * text.hidden_size * text.intermediate_size
    return 2 * layer * text.num_hidden_layers


def head_linear(text: TextConfig) -> int:
    """Forward FLOPs per target token of the head."""
    return 2 * text.hidden_size * text.vocab_size


def causal_attention(text: TextConfig, length: int) -> int:
    """Forward FLOPs of scores and weighted values over the pairs of one segment."""
    pairs = length * (length + 1) // 2
    return 4 * text.num_attention_heads * text.head_dim * pairs * text.num_hidden_layers


def tower_linear(vision: VisionConfig) -> int:
    """Forward FLOPs per patch of all blocks' linear maps."""
    d = vision.hidden_size
    return 2 * vision.depth * (4 * d * d + 3 * d * vision.intermediate_size)


def tower_attention(vision: VisionConfig, height: int, width: int) -> int:
    """Forward FLOPs of attention over one frame of height x width patches."""
    full = len(vision.fullatt_block_indexes)
    side = vision.window_size // vision.patch_size
    windows = _squares(height, side) * _squares(width, side)
    pairs = full * (height * width) ** 2 + (vision.depth - full) * windows
    return 4 * vision.hidden_size * pairs


def merger_linear(vision: VisionConfig) -> tuple[int, int]:
    """Forward FLOPs per visual token of the merger's two linear maps."""
    joined = vision.hidden_size * vision.merge_unit
    return 2 * joined * joined, 2 * joined * vision.out_hidden_size


def _squares(size: int, side: int) -> int:
    """Sum of the squared lengths of `size` cut into pieces of `side`."""
    cuts = [*range(0, size, side), size]
    return sum((end - start) ** 2 for start, end in pairwise(cuts))

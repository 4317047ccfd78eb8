"""FLOPs and parameters from the config alone.

Convention, the same wherever a figure is printed: `CONVENTION`. Model FLOPs as in PaLM
(arXiv:2204.02311, appendix B), except that causal attention is halved and that of a frozen part
only what its gradients to others need is counted.

Legend: a product y = x W costs 1 forward, 1 for the gradient of W, 1 for the gradient of x.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.model import VisionLanguageModel

PARTS = ("vit", "aligner", "llm")
"""What can be trained or frozen; `aligner` is the merger."""
CONVENTION = (
    "useful FLOPs: two per multiply-add of a matrix product; no recompute, no padding, no "
    "pointwise operation; causal attention counts the pairs that exist; a frozen part counts "
    "its forward, and its input gradient where something below it trains"
)

Count = int | np.ndarray
"""A number, or an int64 array of one number per sample or image."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to; the merger lives under `visual.`, yet is its own."""
    if name.startswith("model.visual.merger."):
        return "aligner"
    return "vit" if name.startswith("model.visual.") else "llm"


def parameter_counts(config: VLMConfig) -> dict[str, int]:
    """Parameters of each part, tied ones once."""
    counts = dict.fromkeys(PARTS, 0)
    for name, size in _parameters(config):
        counts[part_of(name)] += size
    return counts


def parameters_by_module(config: VLMConfig) -> dict[str, int]:
    """Parameters of each module; a tied head counts nothing, for it is the embedding."""
    modules = {
        "model.visual.merger.": "merger",
        "model.visual.": "vision tower",
        "model.language_model.embed_tokens.": "embedding",
        "model.language_model.layers.": "decoder blocks",
        "model.language_model.norm.": "final norm",
        "lm_head.": "head",
    }
    order = ("vision tower", "merger", "embedding", "decoder blocks", "final norm", "head")
    counts = dict.fromkeys(order, 0)
    for name, size in _parameters(config):
        counts[next(module for start, module in modules.items() if name.startswith(start))] += size
    return counts


def _parameters(config: VLMConfig) -> list[tuple[str, int]]:
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    return [(name, parameter.numel()) for name, parameter in model.named_parameters()]


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
    flops = sum(text_flops(config.text, length, targets, trains).values())
    for t, h, w in grids:
        flops += sum(vision_flops(config.vision, t, h, w, trains).values())
    return float(flops)


def sample_flops_array(
    config: VLMConfig,
    lengths: np.ndarray,
    grids: np.ndarray,
    owners: np.ndarray,
    targets: np.ndarray,
    trains: Collection[str],
) -> np.ndarray:
    """`sample_flops` of many samples at once, equal to it: a million in a fraction of a second.

    Legend: n samples, m images and videos in all.

    Args:
        lengths, targets: (n,) integers.
        grids: (m, 3) integers, (time, height, width) in patches.
        owners: (m,) integers, the number in 0..n-1 of the sample that each grid belongs to.

    Returns:
        (n,) float64. Counted in int64, which ends at 9.2e18 FLOPs a sample.
    """
    lengths, targets = lengths.astype(np.int64), targets.astype(np.int64)
    flops = sum(text_flops(config.text, lengths, targets, trains).values())
    of_images = vision_flops(config.vision, *grids.astype(np.int64).T, trains)
    np.add.at(flops, owners, sum(of_images.values()))
    return flops.astype(np.float64)


def flops_by_module(
    config: VLMConfig,
    lengths: np.ndarray,
    grids: np.ndarray,
    targets: np.ndarray,
    trains: Collection[str],
) -> dict[str, float]:
    """Useful FLOPs of many samples in all, for each module. Arguments as for
    `sample_flops_array`."""
    lengths, targets = lengths.astype(np.int64), targets.astype(np.int64)
    modules = vision_flops(config.vision, *grids.astype(np.int64).T, trains)
    modules |= text_flops(config.text, lengths, targets, trains)
    return {name: float(flops.sum(dtype=np.float64)) for name, flops in modules.items()}


def text_flops(
    text: TextConfig, length: Count, targets: Count, trains: Collection[str]
) -> dict[str, Count]:
    """Useful FLOPs of the decoder over a sample, or over each of many."""
    # forward; gradient of the weights; gradient of the input: of the first layer's it is
    # wanted by the embedding or by the merger
    passes = 1 + ("llm" in trains) + bool(trains)
    return {
        "decoder linear": passes * decoder_linear(text) * length,
        "causal attention": (3 if trains else 1) * causal_attention(text, length),
        "head": passes * head_linear(text) * targets,
    }


def vision_flops(
    vision: VisionConfig, t: Count, h: Count, w: Count, trains: Collection[str]
) -> dict[str, Count]:
    """Useful FLOPs of the tower and the merger over a grid of patches, or over each of many."""
    below, own = "vit" in trains, "aligner" in trains
    patches = t * h * w
    passes = 3 if below else 1
    tower = passes * (patches * tower_linear(vision) + t * tower_attention(vision, h, w))
    # the patch embedding's input is pixels: no gradient of x
    tower += min(passes, 2) * patches * 2 * vision.patch_dim * vision.hidden_size
    first, second = merger_linear(vision)
    merger = first * (1 + own + below) + second * (1 + own + (own or below))
    return {"vision tower": tower, "merger": patches // vision.merge_unit * merger}


def decoder_linear(text: TextConfig) -> int:
    """Forward FLOPs per token of all layers' linear maps."""
    heads = text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    layer = text.hidden_size * heads + 3 * text.hidden_size * text.intermediate_size
    return 2 * layer * text.num_hidden_layers


def head_linear(text: TextConfig) -> int:
    """Forward FLOPs per target token of the head."""
    return 2 * text.hidden_size * text.vocab_size


def causal_attention(text: TextConfig, length: Count) -> Count:
    """Forward FLOPs of scores and weighted values over the pairs of one segment."""
    pairs = length * (length + 1) // 2
    return 4 * text.num_attention_heads * text.head_dim * pairs * text.num_hidden_layers


def tower_linear(vision: VisionConfig) -> int:
    """Forward FLOPs per patch of all blocks' linear maps."""
    d = vision.hidden_size
    return 2 * vision.depth * (4 * d * d + 3 * d * vision.intermediate_size)


def tower_attention(vision: VisionConfig, height: Count, width: Count) -> Count:
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


def _squares(size: Count, side: int) -> Count:
    """Sum of the squared lengths of `size` cut into pieces of `side`."""
    return size // side * side**2 + (size % side) ** 2

"""FLOPs and parameters from the config alone.

Convention, the same wherever a figure is printed: `CONVENTION`. Model FLOPs as in PaLM
(arXiv:2204.02311, appendix B), except that causal attention is halved and that of a frozen weight
only what gradients of others need is counted.

What trains is told as in `vlm/cost/trained.py`, how often a product is computed in `passes.py`.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost.passes import text_passes, vision_passes
from vlm.cost.trained import PARTS, part_of
from vlm.model import VisionLanguageModel

CONVENTION = (
    "useful FLOPs: two per multiply-add of a matrix product; no recompute, no padding, no "
    "pointwise operation; causal attention counts the pairs that exist; what follows it in the "
    "last layer, and the head, count the target tokens alone; a frozen weight counts its forward, "
    "and its input gradient where something below it trains"
)

Count = int | np.ndarray
"""A number, or an int64 array of one number per sample or image."""


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
        trains: what trains (`vlm/cost/trained.py`); empty for a forward pass alone.
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
    passes = text_passes(text, frozenset(trains))
    pairs = length * (length + 1) // 2
    per_pair = 2 * text.num_attention_heads * text.head_dim
    return {
        "decoder linear": passes.linear * length + passes.last * targets,
        "causal attention": passes.attention * per_pair * pairs,
        "head": passes.head * 2 * text.hidden_size * text.vocab_size * targets,
    }


def vision_flops(
    vision: VisionConfig, t: Count, h: Count, w: Count, trains: Collection[str]
) -> dict[str, Count]:
    """Useful FLOPs of the tower and the merger over a grid of patches, or over each of many."""
    passes = vision_passes(vision, frozenset(trains))
    side = vision.window_size // vision.patch_size
    windows = _squares(h, side) * _squares(w, side)
    pairs = passes.frames * (h * w) ** 2 + passes.windows * windows
    patches = t * h * w
    return {
        "vision tower": passes.linear * patches + 2 * vision.hidden_size * t * pairs,
        "merger": passes.merger * (patches // vision.merge_unit),
    }


def _squares(size: Count, side: int) -> Count:
    """Sum of the squared lengths of `size` cut into pieces of `side`."""
    return size // side * side**2 + (size % side) ** 2

"""How much more a loop with the recipe's flags computes than is useful, for the same gradient.

Where all systems are bound by arithmetic, as on one thread of a CPU, ours can be so many times as
fast, and more only by what the others lose between products. Derived by vlm/cost, not measured.
"""

from dataclasses import dataclass

from bench.peers.setting import Setting
from vlm.config import VLMConfig
from vlm.cost import PARTS, sample_flops, text_flops, vision_flops
from vlm.data.processor import Sizes
from vlm.hf_config import read_config

TRAINS = {1: ("aligner",), 2: PARTS}


@dataclass(frozen=True)
class Work:
    """Of the timed steps."""

    useful: float
    """FLOPs."""
    factors: dict[str, float]
    """What the loop does -> times as many FLOPs as without it; one on top of the other."""

    @property
    def surplus(self) -> float:
        """FLOPs of the loop / useful FLOPs."""
        product = 1.0
        for factor in self.factors.values():
            product *= factor
        return product


def work(setting: Setting, stage: int) -> Work:
    """Of pairs of samples padded to the longer one, with logits for every token, and with blocks
    computed once more in the backward pass."""
    config, trains = read_config(setting.model), TRAINS[stage]
    useful = padded = logits = again = skipped = 0.0
    for first, second in zip(setting.sizes[::2], setting.sizes[1::2], strict=True):
        longest = max(first.length, second.length)
        for sizes in (first, second):
            grids, targets = sizes.grid_thw, sizes.targets
            own = sample_flops(config, sizes.length, grids, targets, trains)
            if stage == 2 or grids:
                useful += own
            else:
                skipped += own
            padded += sample_flops(config, longest, grids, targets, trains)
            logits += sample_flops(config, longest, grids, longest, trains)
            again += _blocks_again(config, longest, sizes, stage)
    factors = {
        "text alone": (useful + skipped) / useful,
        "padding": padded / (useful + skipped),
        "logits of every token": logits / padded,
        "blocks computed again": (logits + again) / logits,
    }
    return Work(useful, {name: factor for name, factor in factors.items() if factor > 1})


def _blocks_again(config: VLMConfig, length: int, sizes: Sizes, stage: int) -> float:
    """FLOPs of their forward pass; the ViT's where it trains."""
    decoder = text_flops(config.text, length, length, ())
    again = decoder["decoder linear"] + decoder["causal attention"]
    for grid in sizes.grid_thw if stage == 2 else ():
        again += vision_flops(config.vision, *grid, ())["vision tower"]
    return float(again)

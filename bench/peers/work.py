"""How much more a loop with the recipe's flags computes than is useful, for the same gradient.

Where all systems are bound by arithmetic, as on one thread of a CPU, ours can be so many times as
fast, and more only by what the others lose between kernels. Derived by vlm/cost, not measured.
"""

from bench.peers.setting import Setting
from vlm.config import VLMConfig
from vlm.cost import PARTS, sample_flops, text_flops, vision_flops
from vlm.data.processor import Sizes
from vlm.hf_config import read_config

TRAINS = {1: ("aligner",), 2: PARTS}


def surplus(setting: Setting, stage: int) -> float:
    """FLOPs of pairs padded to the longer one, with logits for every token and blocks computed
    once more in the backward pass / useful FLOPs, over the timed steps."""
    config = read_config(setting.model)
    trains = TRAINS[stage]
    naive = useful = 0.0
    for first, second in zip(setting.sizes[::2], setting.sizes[1::2], strict=True):
        longest = max(first.length, second.length)
        for sizes in (first, second):
            naive += sample_flops(config, longest, sizes.grid_thw, longest, trains)
            naive += _blocks_again(config, longest, sizes, stage)
            if stage == 2 or sizes.grid_thw:
                useful += sample_flops(config, sizes.length, sizes.grid_thw, sizes.targets, trains)
    return naive / useful


def _blocks_again(config: VLMConfig, length: int, sizes: Sizes, stage: int) -> float:
    """FLOPs of their forward pass; the ViT's where it trains."""
    again = sum(text_flops(config.text, length, 0, ()).values())
    for grid in sizes.grid_thw if stage == 2 else ():
        again += vision_flops(config.vision, *grid, ())["vision tower"]
    return float(again)

"""How much more a loop with the recipe's flags computes than is useful, for the same gradient.

Where all systems are bound by arithmetic, as on one thread of a CPU, ours can be so many times as
fast, and more only by what the others lose between products. Derived by bench/naive.py, whose
formulas are what torch counts in transformers' own model, not measured.
"""

from dataclasses import dataclass
from itertools import pairwise

from bench.naive import growth
from bench.peers.setting import Setting
from vlm.cost.samples import Samples
from vlm.hf_config import read_config


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
    """Of pairs of samples, padded to the longer one."""
    samples = Samples.of([(s.length, s.targets, s.grid_thw) for s in setting.sizes])
    (_, useful), *rest = growth(read_config(setting.model), samples, stage).items()
    flops = [useful, *(value for _, value in rest)]
    factors = {name: b / a for (name, _), (a, b) in zip(rest, pairwise(flops), strict=True)}
    return Work(useful, {name: factor for name, factor in factors.items() if factor > 1})

"""Token and patch budgets of a micro-batch, from the memory that a device has.

    memory x (1 - margin) - training state  >=  peak_activations(tokens, patches)

Tokens and patches grow together, in the data's own proportion, until the memory is full.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from vlm.config import VLMConfig
from vlm.cost.memory import Load, peak_activations
from vlm.cost.samples import CostError
from vlm.data.pack import Budget
from vlm.recompute import Policies

MARGIN = 0.1
"""Share of the memory that is left free: fragmentation, NCCL's buffers, the batch itself, weight
gradients on their way, and 5 % by which the prediction may be wrong."""
GRAIN = 256
"""Budgets are whole multiples of so many tokens."""


@dataclass(frozen=True)
class Fit:
    """Budgets and what they follow from, in bytes."""

    budget: Budget
    memory: int
    state: int
    """Weights and training state."""
    activations: int
    """Predicted peak of a micro-batch that fills both budgets."""

    def line(self) -> str:
        """For the person who watches."""
        return (
            f"budgets of a micro-batch: {self.budget.tokens:,} tokens, {self.budget.patches:,} "
            f"patches; {self.state / 1e9:.3g} GB of weights and training state and "
            f"{self.activations / 1e9:.3g} GB of activations, predicted, in "
            f"{self.memory / 1e9:.3g} GB less {MARGIN:.0%}"
        )


def fit_budget(
    config: VLMConfig,
    trains: Collection[str],
    recompute: Policies,
    size: int,
    state: int,
    memory: int,
    lengths: np.ndarray,
    patches: np.ndarray,
    share: int,
) -> Fit:
    """The largest budgets whose micro-batch fits; never less than the largest sample needs.

    Every token counts as learnt.

    Args:
        trains: as in `vlm/cost/trained.py`; size: bytes per value of weights and activations.
        state: bytes of weights and training state; memory: bytes free before they are made.
        lengths, patches: (n,) of the samples.
        share: samples that a rank has in a step: budgets that hold any so many are enough.

    Raises:
        CostError: not even the largest sample fits.
    """
    room = int(memory * (1 - MARGIN)) - state
    longest, most = int(lengths.max()), max(int(patches.max()), config.vision.merge_unit)
    ratio = float(patches.sum() / lengths.sum())

    def budget(grains: int) -> Budget:
        tokens = min(max(grains * GRAIN, longest), share * longest)
        return Budget(tokens=tokens, patches=min(max(int(tokens * ratio), most), share * most))

    def activations(grains: int) -> int:
        limits = budget(grains)
        load = Load(limits.tokens, limits.tokens, limits.patches)
        return sum(peak_activations(config, load, trains, recompute, size).values())

    if activations(0) > room:
        raise CostError(
            f"a sample of {longest:,} tokens and {most:,} patches does not fit: {state / 1e9:.3g} "
            f"GB of weights and training state and {activations(0) / 1e9:.3g} GB of activations "
            f"are more than {memory / 1e9:.3g} GB less {MARGIN:.0%}; lower max_length or "
            "max_pixels, set gradient_checkpointing: true, train on more GPUs, or take deepspeed: "
            "zero2_offload"
        )
    fits, fails = 0, -(-share * longest // GRAIN) + 1  # budgets do not grow beyond
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if activations(middle) <= room else (fits, middle)
    return Fit(budget(fits), memory, state, activations(fits))

"""How far a step moved the weights of each group: ||update|| / ||weights||.

Around 1e-3 is healthy; 1e-2 is a learning rate that destroys, 1e-5 one that hardly trains. No
weights of before the step are kept: AdamW's own arithmetic gives the update back from what it
left behind.
"""

import math
from itertools import groupby

import torch
from torch import Tensor

from train.engine import MOMENTS, Engine
from train.world import World

CHUNK = 1 << 24
"""Values looked at at once: 64 MiB of float32."""


@torch.no_grad()
def update_ratios(engine: Engine, world: World) -> dict[str, float]:
    """By group, of the step that was just taken; every rank calls this.

    Reads the device once. Call it before the learning rates are set for another step.
    """
    groups = {group["name"]: group for group in engine.param_groups}
    nothing = torch.zeros(2, dtype=torch.float64, device=world.device)
    squares = {name: nothing.clone() for name in groups}  # of updates and of weights
    for parameter, own in groupby(engine.fragments(), key=lambda f: f.parameter):
        values = {fragment.kind: fragment.values for fragment in own}
        name = engine.group_of[parameter]
        pieces = zip(*(values[kind].split(CHUNK) for kind in ("master", *MOMENTS)), strict=True)
        for master, *moments in pieces:
            update = last_update(master, *moments, engine.updates, groups[name])
            squares[name] += torch.stack([update.norm(), master.norm()]).to(nothing).square()
    totals = iter(world.sum(torch.cat([*squares.values()]).tolist()))
    pairs = zip(groups, totals, totals, strict=True)
    return {name: math.sqrt(moved / size) if size else 0.0 for name, moved, size in pairs}


def last_update(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, updates: int, group: dict
) -> Tensor:
    """(n,) float32: what step number `updates` added to give `master`.

    AdamW (arXiv:1711.05101) takes w to w (1 - lr decay) - lr m / (sqrt(v) + eps), with the moments
    corrected for their start at 0; this solves it for what was added to w.

    Args:
        master, exp_avg, exp_avg_sq: (n,) float32, as the step left them.
        group: of the optimiser, with the rates of that step.
    """
    beta1, beta2 = group["betas"]
    decay = group["lr"] * group["weight_decay"]
    root = (exp_avg_sq / (1 - beta2**updates)).sqrt_().add_(group["eps"])
    step = exp_avg.div(root).mul_(group["lr"] / (1 - beta1**updates))
    return step.add_(master, alpha=decay).div_(decay - 1)

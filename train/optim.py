"""The optimiser and its schedule: AdamW, warm-up, then cosine, linear, constant or WSD.

A new schedule goes here, as one more pure function in `SCHEDULES`.
"""

import math
from collections.abc import Callable

import torch

from train.config import TrainConfig
from train.freeze import Group


def cosine(progress: float, _config: TrainConfig) -> float:
    """Half a cosine from 1 to 0 (arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, _config: TrainConfig) -> float:
    return 1 - progress


def constant(_progress: float, _config: TrainConfig) -> float:
    return 1.0


def wsd(progress: float, config: TrainConfig) -> float:
    """Warm-up, stable, decay (arXiv:2404.06395): 1, then a straight line to 0 over the last
    `decay_ratio`."""
    return min(1.0, (1 - progress) / config.decay_ratio) if config.decay_ratio else 1.0


SCHEDULES: dict[str, Callable[[float, TrainConfig], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
}
"""(progress after the warm-up, 0..1; config) -> share of the learning rate."""


def learning_rate_scale(step: int, total_steps: int, config: TrainConfig) -> float:
    """Share of the learning rate at optimiser step `step` (from 0) of `total_steps`.

    Warm-up rises linearly over `warmup_steps`, or else ceil(warmup_ratio x total) steps; as in the
    peer, the first step of a run with a warm-up has rate 0.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return SCHEDULES[config.lr_scheduler_type](min(1.0, progress), config)


def make_optimizer(groups: list[Group], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the groups, in their order; each remembers its name and
    its full learning rate."""
    settings = [
        {
            "params": list(group.parameters.values()),
            "name": group.name,
            "lr": group.learning_rate,
            "full_lr": group.learning_rate,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    return torch.optim.AdamW(
        settings,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,  # CPU and CUDA, on which runs take place, both have it
    )


def set_learning_rate(param_groups: list[dict], scale: float) -> None:
    """Give every group its share of its full learning rate."""
    for group in param_groups:
        group["lr"] = group["full_lr"] * scale

"""Do all systems take the same step? Their gradients, compared with ours.

Each system trains one step over the same global batch, by its own command, unclipped, and saves a
checkpoint. AdamW's first moment is then (1 - beta1) of the gradient, so that none of them need be
touched. Ours is the gradient of the mean over all targets of the global batch.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bench.peers.systems import Job

BETA1 = 0.9
GROUPS = {
    "vit": re.compile(r"model\.visual\.(?!merger\.)"),
    "aligner": re.compile(r"model\.visual\.merger\."),
    "llm": re.compile(r"(model\.language_model|lm_head)\."),
}
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Of a gradient from ours, by group of parameters that trains."""

    relative_difference: dict[str, float]
    """Norm of the difference / norm of ours."""
    cosine: dict[str, float]


def compare(theirs: Gradients, ours: Gradients) -> Difference:
    """ValueError where other parameters trained."""
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        raise ValueError(f"other parameters train: {len(odd)} of them, {odd[0]} first")
    relative, cosine = {}, {}
    for group, pattern in GROUPS.items():
        names = [name for name in ours if pattern.match(name)]
        if not names:
            continue
        a, b = (torch.cat([g[name].flatten().double() for name in names]) for g in (theirs, ours))
        relative[group] = float((a - b).norm() / b.norm())
        cosine[group] = float(a @ b / (a.norm() * b.norm()))
    return Difference(relative, cosine)


def gradients_of_ours(job: Job) -> Gradients:
    """From the fragments of our checkpoint of the first step."""
    path = job.out / "run" / "checkpoint-1" / "engine" / "rank-00000.safetensors"
    gradients = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            name, _, place = key.partition("|")
            if place == "exp_avg|0":
                gradients[name] = file.get_tensor(key).flatten() / (1 - BETA1)
    return gradients


def gradients_of_peer(job: Job) -> Gradients:
    """From the optimizer.pt of transformers' Trainer, whose state has numbers instead of names."""
    path = next(job.out.glob("**/checkpoint-1/optimizer.pt"))
    state = torch.load(path, weights_only=True)["state"]
    names = trainer_order(job.setting.model, job.stage)
    if len(names) != len(state):
        raise ValueError(f"{path} has {len(state)} parameters; {len(names)} should train")
    moments = (state[number]["exp_avg"] for number in range(len(names)))
    return {n: m.flatten() / (1 - BETA1) for n, m in zip(names, moments, strict=True)}


def trainer_order(model: Path, stage: int) -> list[str]:
    """Names in the order of its optimiser: those with weight decay first."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Trainer

    with torch.device("meta"):
        stock = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(model))
    decayed = set(Trainer.get_decay_parameter_names(None, stock))
    names = [n for n, _ in stock.named_parameters() if stage == 2 or GROUPS["aligner"].match(n)]
    return sorted(names, key=lambda name: name not in decayed)

"""What trains: every parameter matched exactly once, in a group with its learning rate.

The merger lives under `model.visual.` and is a part of its own: freezing the ViT must not
freeze it. A tied head is the embedding, so it is counted and frozen with it.
"""

from dataclasses import dataclass

from torch import nn

from train.config import TrainConfig, UsageError
from vlm.cost import PARTS, part_of


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    """Part and kind, such as `vit/decay`."""
    learning_rate: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]


def freeze(model: nn.Module, config: TrainConfig) -> list[Group]:
    """Set requires_grad of every parameter and return the groups that train.

    Raises UsageError where nothing is left to train.
    """
    trains = trained_parts(config)
    rates = {
        "vit": config.learning_rate if config.vit_lr is None else config.vit_lr,
        "aligner": config.learning_rate if config.aligner_lr is None else config.aligner_lr,
        "llm": config.learning_rate,
    }
    groups = {
        (part, kind): Group(f"{part}/{kind}", rates[part], decay, {})
        for part in PARTS
        for kind, decay in (("decay", config.weight_decay), ("no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in trains)
        if part in trains:
            kind = "decay" if parameter.dim() > 1 else "no_decay"
            groups[part, kind].parameters[name] = parameter
    kept = [group for group in groups.values() if group.parameters]
    if not kept:
        raise UsageError("no parameter is left to train")
    return kept


def trained_parts(config: TrainConfig) -> frozenset[str]:
    """The parts that are not frozen."""
    frozen = {"vit": config.freeze_vit, "aligner": config.freeze_aligner, "llm": config.freeze_llm}
    return frozenset(part for part in PARTS if not frozen[part])


def banner(model: nn.Module, groups: list[Group]) -> str:
    """A table of what trains and what is frozen."""
    totals, trained = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        totals[part_of(name)] += parameter.numel()
        trained[part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    rates = {group.name.split("/")[0]: group.learning_rate for group in groups}
    lines = [f"{'part':10}{'parameters':>16}{'trained':>16}  learning rate"]
    for part in PARTS:
        rate = f"{rates[part]:g}" if part in rates else "frozen"
        lines.append(f"{part:10}{totals[part]:16,}{trained[part]:16,}  {rate}")
    total, all_trained = sum(totals.values()), sum(trained.values())
    lines.append(f"{'all':10}{total:16,}{all_trained:16,}  ({all_trained / total:.2%} trained)")
    return "\n".join(lines)

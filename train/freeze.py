"""What trains: every parameter matched exactly once, in a group with its learning rate.

Of several options that speak of a parameter, the first in this order decides:
`trainable_parameters`, `freeze_parameters`, `last_*_layers`, `freeze_*`.

The merger lives under `model.visual.` and is a part of its own: freezing the ViT must not
freeze it. A tied head is the embedding, so it is counted and frozen with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn

from train.config import TrainConfig, UsageError
from vlm.config import VLMConfig
from vlm.cost import PARTS, names_of, part_of
from vlm.model import VisionLanguageModel

BLOCKS = {"vit": "model.visual.blocks.", "llm": "model.language_model.layers."}
ROW = "{:8}{:>16}{:>16}{:>13}{:>16}{:>14}"


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    """Part and kind, such as `vit/decay`."""
    learning_rate: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]


def freeze(model: VisionLanguageModel, config: TrainConfig) -> list[Group]:
    """Set requires_grad of every parameter and return the groups that train.

    Raises UsageError as `trained_names` does.
    """
    parameters = dict(model.named_parameters())
    trained = set(trained_names(parameters, config, model.config))
    rates = {"vit": config.vit_lr, "aligner": config.aligner_lr}
    decays = {"vit": config.vit_weight_decay, "aligner": config.aligner_weight_decay}
    groups = []
    for part in PARTS:
        rate = _or(rates.get(part), config.learning_rate)
        decay = _or(decays.get(part), config.weight_decay)
        groups += [
            Group(f"{part}/decay", rate, decay, {}),
            Group(f"{part}/no_decay", rate, 0.0, {}),
        ]
    by_name = {group.name: group for group in groups}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
        if name in trained:
            kind = "decay" if parameter.dim() > 1 else "no_decay"  # norms and biases do not decay
            by_name[f"{part_of(name)}/{kind}"].parameters[name] = parameter
    return [group for group in groups if group.parameters]


def trained_parts(config: TrainConfig, model_config: VLMConfig) -> frozenset[str]:
    """The parts of which anything trains; beside one that is partly frozen, the names of what
    trains of it (`vlm/cost/trained.py`). Needs no weights.

    Raises UsageError as `trained_names` does.
    """
    with torch.device("meta"):
        names = [name for name, _ in VisionLanguageModel(model_config).named_parameters()]
    return names_of(trained_names(names, config, model_config), names)


def trained_names(names: Iterable[str], config: TrainConfig, model_config: VLMConfig) -> list[str]:
    """Those of the names that train, in their order.

    Raises:
        UsageError: a pattern that matches no name, more last layers than there are, or nothing is
            left to train.
    """
    names = list(names)
    for option in ("freeze_parameters", "trainable_parameters"):
        for pattern in getattr(config, option):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(f"{option}: {pattern} matches no parameter{_hint(pattern, names)}")
    last = _last_blocks(config, model_config)
    trained = [name for name in names if _trains(name, config, last)]
    if not trained:
        raise UsageError("no parameter is left to train; see freeze_parameters and freeze_*")
    return trained


def _last_blocks(config: TrainConfig, model_config: VLMConfig) -> dict[str, int]:
    """Part -> its first block that trains, where `last_*_layers` is given."""
    first = {}
    for part, option, blocks in (
        ("vit", "last_vit_layers", model_config.vision.depth),
        ("llm", "last_llm_layers", model_config.text.num_hidden_layers),
    ):
        wanted = getattr(config, option)
        if wanted is not None and wanted > blocks:
            raise UsageError(f"{option} is {wanted}, but the model has {blocks}")
        if wanted is not None:
            first[part] = blocks - wanted
    return first


def _trains(name: str, config: TrainConfig, last: dict[str, int]) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in config.trainable_parameters):
        return True
    if any(fnmatchcase(name, pattern) for pattern in config.freeze_parameters):
        return False
    part = part_of(name)
    if part in last:
        if name.startswith(BLOCKS[part]):
            return int(name.removeprefix(BLOCKS[part]).split(".")[0]) >= last[part]
        return name.startswith(("model.language_model.norm.", "lm_head."))
    frozen = {"vit": config.freeze_vit, "aligner": config.freeze_aligner, "llm": config.freeze_llm}
    return not frozen[part]


def _hint(pattern: str, names: list[str]) -> str:
    if fnmatchcase("lm_head.weight", pattern):
        return "; the head is tied to model.language_model.embed_tokens.weight"
    if any(fnmatchcase(name, f"*{pattern}*") for name in names):
        return f" (did you mean *{pattern}*?)"
    near = get_close_matches(pattern, names, 1, 0.0)
    return f" (the nearest is {near[0]})"


def banner(model: nn.Module, groups: list[Group], config: TrainConfig) -> str:
    """What trains and what is frozen: a table of the parts, and a line for every option that
    speaks of single layers or parameters."""
    parameters = dict(model.named_parameters())
    lines = [
        ROW.format("part", "parameters", "trained", "tensors", "learning rate", "weight decay")
    ]
    for part in PARTS:
        own = [p for name, p in parameters.items() if part_of(name) == part]
        mine = [group for group in groups if group.name.startswith(f"{part}/")]
        rate = f"{mine[0].learning_rate:g}" if mine else "frozen"
        decay = f"{max(group.weight_decay for group in mine):g}" if mine else ""
        lines.append(ROW.format(part, *_counts(own), rate, decay).rstrip())
    counts = _counts(list(parameters.values()))
    lines.append(ROW.format("all", *counts, "", "").rstrip())
    for option in ("last_vit_layers", "last_llm_layers"):
        if getattr(config, option):
            lines.append(f"{option}: {getattr(config, option)}")
    for option in ("freeze_parameters", "trainable_parameters"):
        for pattern in getattr(config, option):
            count = sum(fnmatchcase(name, pattern) for name in parameters)
            lines.append(f"{option}: {pattern} ({count} tensors)")
    return "\n".join(lines)


def _counts(parameters: list[nn.Parameter]) -> tuple[str, str, str]:
    """Parameters, those that train of them, and how many tensors those are."""
    trained = [p for p in parameters if p.requires_grad]
    numbers = sum(p.numel() for p in parameters), sum(p.numel() for p in trained)
    return f"{numbers[0]:,}", f"{numbers[1]:,}", f"{len(trained)} of {len(parameters)}"


def _or(value: float | None, default: float) -> float:
    return default if value is None else value

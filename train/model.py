"""The model as a run has it: loaded, frozen as asked, its blocks under their policies."""

from pathlib import Path

import torch

from train.config import TrainConfig
from train.freeze import Group, freeze
from vlm.checkpoint import load_model
from vlm.compile import compile_blocks
from vlm.model import VisionLanguageModel


def open_model(
    path: Path, config: TrainConfig, device: torch.device
) -> tuple[VisionLanguageModel, list[Group]]:
    """The model, ready to train, and the groups of parameters that do.

    Raises CheckpointError, UsageError: one sentence.
    """
    model = load_model(path, getattr(torch, config.dtype), device).train()
    groups = freeze(model, config)
    model.set_recompute(*config.recompute)
    if config.compile:
        compile_blocks(model)
    return model, groups

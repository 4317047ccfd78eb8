"""What DeepSpeed is told: a few named settings, or the user's JSON file.

Stage 3 is refused: it spreads the weights too and gathers them in a module's forward pass, while
the loss (`vlm/loss.py`) reads the head's weight outside of one.
"""

import json
from pathlib import Path

from train.config import TrainConfig, UsageError

STAGES = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
}
OURS = {"optimizer", "scheduler", "fp16", "bf16", "amp"}
"""Sections of a DeepSpeed file that other options decide."""


def deepspeed_config(config: TrainConfig, world_size: int) -> dict:
    """DeepSpeed's own settings: what a step is and how it is added up is the loop's business,
    all else is taken from the user's JSON file.

    Raises UsageError for a file that cannot be used.
    """
    settings = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the loop decides where a step ends
        "train_batch_size": config.per_device_train_batch_size * world_size,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled at the first start
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 1_000_000_000,
    }
    if config.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if config.deepspeed in STAGES:
        theirs, zero = {}, STAGES[config.deepspeed]
    else:
        theirs = _user_settings(Path(config.deepspeed))
        zero = {"stage": 2} | theirs.get("zero_optimization", {})
    return theirs | settings | {"zero_optimization": {"overlap_comm": False} | zero}


def _user_settings(path: Path) -> dict:
    try:
        settings = _without_auto(json.loads(path.read_text(encoding="utf-8")))
        zero = settings.get("zero_optimization", {})
        device = zero.get("offload_optimizer", {}).get("device", "none")
    except (OSError, ValueError, AttributeError) as error:
        names = ", ".join(STAGES)
        raise UsageError(
            f"deepspeed: {path} is none of {names}, nor a file of DeepSpeed's JSON ({error})"
        ) from None
    if zero.get("stage") == 3:
        raise UsageError(
            f"{path} asks for ZeRO stage 3, which cannot be used: it spreads the weights, and the "
            "loss reads the head's outside of a module's forward pass; take stage 1 or 2"
        )
    if zero.get("stage", 2) not in (1, 2):
        raise UsageError(f"{path} asks for ZeRO stage {zero['stage']}; take 1 or 2")
    if device not in ("none", "cpu"):
        raise UsageError(f"{path} offloads the optimizer to {device!r}; only 'cpu' is supported")
    return {key: value for key, value in settings.items() if key not in OURS}


def _without_auto(settings: dict) -> dict:
    """Without the keys that transformers' Trainer would fill in."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }

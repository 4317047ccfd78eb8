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
OURS = {"optimizer", "scheduler", "fp16", "bf16", "amp", "gradient_allreduce_op"}
"""What of a DeepSpeed file other options or the loop decide."""
NO_STAGE_3 = (
    "ZeRO stage 3, which cannot be used: it spreads the weights, and the loss reads the head's "
    "outside of a module's forward pass; take stage 1 or 2"
)


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
    names = ", ".join(STAGES)
    if str(path) == "zero3":
        raise UsageError(f"deepspeed: zero3 asks for {NO_STAGE_3} ({names})")
    if str(path).lower() in ("none", "false", "no", "off"):
        raise UsageError(f"deepspeed: {path} is no setting; for no DeepSpeed write null")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_hook=_stated)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"deepspeed: {path} is none of {names}, nor a file of DeepSpeed's JSON ({error})"
        ) from None
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    offload = zero.get("offload_optimizer", {}) if isinstance(zero, dict) else None
    if not isinstance(offload, dict):
        raise UsageError(
            f"deepspeed: {path} is no file of DeepSpeed's JSON: it, zero_optimization and "
            "offload_optimizer are to be objects, {...}"
        )
    stage, device = zero.get("stage", 2), offload.get("device", "none")
    if stage == 3:
        raise UsageError(f"{path} asks for {NO_STAGE_3}")
    if stage not in (1, 2):
        raise UsageError(f"{path} asks for ZeRO stage {stage}; take 1 or 2")
    if device not in ("none", "cpu"):
        raise UsageError(f"{path} offloads the optimizer to {device!r}; only 'cpu' is supported")
    scales = settings.get("prescale_gradients") or settings.get("gradient_predivide_factor", 1) != 1
    if scales and stage == 2 and zero.get("reduce_scatter", True):
        raise UsageError(
            f"{path} has prescale_gradients or gradient_predivide_factor, which DeepSpeed cannot "
            "with stage 2's reduce_scatter; leave them out"
        )
    return {key: value for key, value in settings.items() if key not in OURS}


def _stated(settings: dict) -> dict:
    """Without the keys that say nothing, and `auto`, which transformers' Trainer would fill in."""
    return {key: value for key, value in settings.items() if value not in (None, "auto")}

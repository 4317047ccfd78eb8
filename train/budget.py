"""`--auto_budget`: the device's memory, and the budgets of micro-batches that follow from it.

They are derived at the run's first start and recorded in `budget.json` of the run. A resume takes
them from there, and so goes on with the same micro-batches, unless something they follow from has
changed or the device has too little memory for them: then they are derived anew, which changes no
gradient.
"""

import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from train.config import TrainConfig, UsageError
from train.deepspeed_config import deepspeed_config
from train.state import Run
from train.world import World
from vlm.checkpoint import write_json
from vlm.config import VLMConfig
from vlm.cost.budget import MARGIN, Fit, fit_budget
from vlm.cost.memory import BUCKET, training_state
from vlm.cost.report import SIZES
from vlm.cost.samples import CostError
from vlm.cost.trained import any_trains
from vlm.data.pack import Budget
from vlm.model import VisionLanguageModel
from vlm.recompute import Policies

GROUP = Path("/sys/fs/cgroup")
"""Of a container, where its memory is told (cgroup v2)."""
UNEVEN = 0.02
"""Share of the memory by which less may be free at a resume: another process, another driver. What
is free is never the same to a byte, and other budgets are other micro-batches."""


def budget_of(
    config: TrainConfig,
    world: World,
    run: Run,
    model: VLMConfig,
    trains: Collection[str],
    global_batch_size: int,
    resumes: bool,
    lengths: np.ndarray,
    patches: np.ndarray,
) -> tuple[Budget, list[str]]:
    """What a micro-batch may hold, the same on every rank, and lines about it.

    Args: lengths, patches: (n,) of the samples; of a stream those of the largest there may be.

    Raises UsageError where the largest sample does not fit.
    """
    if not config.auto_budget:
        return config.budget, []
    share = -(-global_batch_size // world.size)
    cause = {
        "ranks": world.size,
        "global_batch_size": global_batch_size,
        "trains": sorted(trains),
        "recompute": list(config.recompute),
        "compile": config.compile,
        "dtype": config.dtype,
        "deepspeed": config.deepspeed,
        "largest": [int(lengths.max()), int(patches.max())],
    }
    file = run.dir / "budget.json"
    memory = min(world.gather([free_memory(world)]))
    if resumes and (found := world.from_first(lambda: _recorded(file, cause, memory))):
        budget = Budget(tokens=found["tokens"], patches=found["patches"])
        return budget, [
            f"budgets of a micro-batch, as before: {budget.tokens:,} tokens, "
            f"{budget.patches:,} patches"
        ]
    priced = model, trains, priced_recompute(config), SIZES[config.dtype]
    with torch.device("meta"):
        weights = VisionLanguageModel(model)
    state = sum(state_of(config, world, weights, trains).values())
    try:
        fit = fit_budget(*priced, state, memory, lengths, patches, share)
    except CostError as error:
        raise UsageError(f"auto_budget: {error}") from None
    if not config.dry_run:
        world.from_first(lambda: _record(file, fit, cause))
    return fit.budget, [fit.line()]


def state_of(
    config: TrainConfig, world: World, model: VisionLanguageModel, trains: Collection[str]
) -> dict[str, int]:
    """Bytes on each device of weights and training state, by kind, under the run's engine.

    Args: model: for its sizes; it may be on the meta device.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(size for name, size in sizes.items() if any_trains(name, trains))
    stage, offloads, bucket = 0, False, BUCKET
    if config.deepspeed and world.launched:
        zero = deepspeed_config(config, world.size)["zero_optimization"]
        stage = zero["stage"]
        offloads = zero.get("offload_optimizer", {}).get("device") == "cpu"
        bucket = int(zero.get("reduce_bucket_size", BUCKET))
        if world.device.type == "cpu":
            offloads = False  # it is the same memory
            bucket = min(bucket, trained)  # pages that nothing is written to are not taken
    total, size = sum(sizes.values()), SIZES[config.dtype]
    return training_state(total, trained, world.size, size, stage, offloads, bucket)


def priced_recompute(config: TrainConfig) -> Policies:
    """What the memory model is told: where `pointwise` is asked for, a compiled block keeps more,
    though no more than under `none`."""
    if not config.compile:
        return config.recompute
    vit, llm = ("none" if policy == "pointwise" else policy for policy in config.recompute)
    return vit, llm


def free_memory(world: World) -> int:
    """Bytes that this rank may still take: of its device, or its share of the host's."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    figures = dict(line.split(":") for line in lines)
    free = 1024 * int(figures["MemAvailable"].split()[0])
    with suppress(OSError, ValueError, KeyError):  # "max" where it has no limit
        limit, used = (
            int((GROUP / f"memory.{name}").read_text(encoding="utf-8"))
            for name in ("max", "current")
        )
        lines = (GROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        kinds = dict(line.split() for line in lines)
        # files that were read: the kernel drops them where memory is asked for
        cached = int(kinds["inactive_file"]) + int(kinds["active_file"])
        free = min(free, limit - used + cached)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _recorded(file: Path, cause: dict, memory: int) -> dict | None:
    """None where there is none, what it follows from has changed, or it does not fit `memory`."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads(file.read_text(encoding="utf-8"))
        needed = record["bytes"]["state"] + record["bytes"]["activations"]
        if record["cause"] == cause and needed <= memory * (1 - MARGIN + UNEVEN):
            return record
    return None


def _record(file: Path, fit: Fit, cause: dict) -> None:
    figures = {"memory": fit.memory, "state": fit.state, "activations": fit.activations}
    limits = {"tokens": fit.budget.tokens, "patches": fit.budget.patches}
    try:
        write_json(file, limits | {"bytes": figures, "cause": cause})
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None

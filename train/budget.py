"""`--auto_budget`: the device's memory, and the budgets of micro-batches that follow from it.

They are derived at the run's first start and recorded in `budget.json` of the run. A resume takes
them from there, and so goes on with the same micro-batches, unless something they follow from has
changed: then they are derived anew, which changes no gradient.
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
from vlm.cost.budget import Fit, fit_budget
from vlm.cost.memory import training_state
from vlm.cost.report import SIZES
from vlm.cost.samples import CostError
from vlm.cost.trained import any_trains
from vlm.data.pack import Budget
from vlm.model import VisionLanguageModel


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
        "dtype": config.dtype,
        "deepspeed": config.deepspeed,
        "largest": [int(lengths.max()), int(patches.max())],
    }
    file = run.dir / "budget.json"
    if resumes and (found := world.from_first(lambda: _recorded(file, cause))):
        budget = Budget(tokens=found["tokens"], patches=found["patches"])
        return budget, [
            f"budgets of a micro-batch, as before: {budget.tokens:,} tokens, "
            f"{budget.patches:,} patches"
        ]
    memory = min(world.gather([free_memory(world)]))
    priced = model, trains, config.recompute, SIZES[config.dtype]
    try:
        state = sum(state_of(config, world, model, trains).values())
        fit = fit_budget(*priced, state, memory, lengths, patches, share)
    except CostError as error:
        raise UsageError(f"auto_budget: {error}") from None
    if not config.dry_run:
        world.from_first(lambda: _record(file, fit, cause))
    return fit.budget, [fit.line()]


def state_of(
    config: TrainConfig, world: World, model: VLMConfig, trains: Collection[str]
) -> dict[str, int]:
    """Bytes on each device of weights and training state, by kind, under the run's engine."""
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in VisionLanguageModel(model).named_parameters()}
    trained = sum(size for name, size in sizes.items() if any_trains(name, trains))
    stage, offloads = 0, False
    if config.deepspeed and world.launched:
        zero = deepspeed_config(config, world.size)["zero_optimization"]
        stage = zero["stage"]
        offloads = zero.get("offload_optimizer", {}).get("device") == "cpu"
        offloads &= world.device.type == "cuda"  # else it is the same memory
    total, size = sum(sizes.values()), SIZES[config.dtype]
    return training_state(total, trained, world.size, size, stage, offloads)


def free_memory(world: World) -> int:
    """Bytes that this rank may still take: of its device, or its share of the host's."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    figures = dict(line.split(":") for line in lines)
    free = 1024 * int(figures["MemAvailable"].split()[0])
    group = Path("/sys/fs/cgroup")  # of a container; "max" where it has no limit
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _recorded(file: Path, cause: dict) -> dict | None:
    """None where there is none, or what it follows from has changed."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["cause"] == cause:
            return record
    return None


def _record(file: Path, fit: Fit, cause: dict) -> None:
    figures = {"memory": fit.memory, "state": fit.state, "activations": fit.activations}
    limits = {"tokens": fit.budget.tokens, "patches": fit.budget.patches}
    try:
        write_json(file, limits | {"bytes": figures, "cause": cause})
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None

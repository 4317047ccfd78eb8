"""`--dry_run`: what a run would do and take, and its costliest micro-batch."""

import re
import time
from collections.abc import Collection, Sequence
from itertools import groupby

import numpy as np
import torch

from train.budget import free_memory, priced_recompute, state_of
from train.config import TrainConfig, UsageError
from train.data import TrainData
from train.provenance import device_name
from train.world import World
from vlm.batch import Batch
from vlm.cost import flops_by_module
from vlm.cost.hardware import peak_tflops
from vlm.cost.memory import Load, peak_activations
from vlm.cost.report import SIZES, Setup
from vlm.data.loader import StepDataset, open_loader
from vlm.data.plan_report import report
from vlm.data.processor import Processor
from vlm.data.stream import StreamDataset
from vlm.gradients import drop_gradients
from vlm.loss import cross_entropy
from vlm.model import VisionLanguageModel

PLANNED = 100
"""Steps, evenly spread over an epoch, that the plan's figures are from."""


def warm_up(
    config: TrainConfig,
    world: World,
    model: VisionLanguageModel,
    dataset: StepDataset | StreamDataset,
    trains: Collection[str],
) -> float:
    """Forward and backward of the costliest micro-batch, beside as much memory as gradients and
    optimiser will take, so that memory fails here or never (but for a stream). No gradient is
    kept. Every rank calls this; returns its seconds.

    Raises UsageError where memory runs out on any rank.
    """
    state = state_of(config, world, model, trains)
    beside = sum(state.values()) - state["weights"]
    batch = dataset.costliest()
    hooks = drop_gradients(model)

    def take() -> float:
        try:
            held = _hold(beside, world)
            began = time.perf_counter()
            _forward_and_backward(model, batch.to(world.device))
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            del held
            return time.perf_counter() - began
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"rank {world.rank} runs out of memory in the costliest micro-batch "
                f"({len(batch.input_ids):,} tokens, {len(batch.patches):,} patches), beside "
                f"{beside / 1e9:.1f} GB for gradients and optimiser; lower token_budget and "
                "patch_budget, use auto_budget, gradient_checkpointing full or more ranks "
                f"({str(error).splitlines()[0]})"
            ) from None

    try:
        return world.together(take)
    finally:
        for hook in hooks:
            hook.remove()


def _hold(size: int, world: World) -> torch.Tensor | None:
    """A block of so many bytes; of a CPU's memory, which nothing takes before it is written to,
    none, but the same error where less is free."""
    if world.device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=world.device)
    if size > (free := free_memory(world)):
        raise torch.OutOfMemoryError(f"{free / 1e9:.1f} GB of the host's memory are free")
    return None


def _forward_and_backward(model: VisionLanguageModel, batch: Batch) -> None:
    hidden = model(batch)
    cross_entropy(hidden, model.head_weight, batch.targets, batch.weights).sum.backward()


def dry_run(
    config: TrainConfig,
    world: World,
    processor: Processor,
    data: TrainData,
    model: VisionLanguageModel,
    trains: Collection[str],
    about: Sequence[str],
) -> None:
    """Print plan, cost, memory and the first sample, then run the costliest micro-batch.

    Every rank calls this, the first one prints, and first of all `about`. Of a stream there is
    neither plan nor cost before it is read.
    """
    with open_loader(data.dataset, data.progress.position) as steps:
        first = next(batch for step in steps for batch in step.micro_batches if batch.ids)
    if world.first:
        print("\n".join(about))
        if isinstance(data.dataset, StepDataset):
            print(f"\nplan of an epoch\n{report(data.dataset.plan, PLANNED).table()}")
            _print_cost(config, world, data, model, trains)
        _print_memory(config, world, data.dataset.costliest(), model, trains)
        print(f"\nthe first sample, {first.ids[0]}, with what is learnt marked by >\n")
        print(marked(first, processor))
    seconds = warm_up(config, world, model, data.dataset, trains)
    if world.first:
        print(f"\nthe costliest micro-batch took {seconds:.2f} s forward and backward", end="")
        if world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(world.device) / 1e9
            print(f", and {peak:.2f} GB with weights, gradients and optimiser", end="")
        print("; nothing was trained")


def marked(batch: Batch, processor: Processor) -> str:
    """The text of a micro-batch's first sample, as the model reads it: lines of what is learnt
    begin with `>`."""
    ids = batch.input_ids[: batch.segments.lengths[0]].tolist()
    learnt = set((batch.target_rows + 1).tolist())
    lines = []
    for is_learnt, rows in groupby(range(len(ids)), lambda row: row in learnt):
        text = processor.tokenizer.decode([ids[row] for row in rows], skip_special_tokens=False)
        text = re.sub(r"(<\|(?:image|video)_pad\|>)+", _counted, text)
        lines += [("> " if is_learnt else "  ") + line for line in text.split("\n")]
    return "\n".join(lines)


def _counted(pads: re.Match) -> str:
    return f"{pads[1]} x {len(pads[0]) // len(pads[1])}"


def _print_cost(
    config: TrainConfig,
    world: World,
    data: TrainData,
    model: VisionLanguageModel,
    trains: Collection[str],
) -> None:
    """Of a step of average samples; text alone counts nothing where it is left out."""
    index, size = data.dataset.index, data.progress.global_batch_size
    taken = index.select(np.flatnonzero(index.patches)) if data.dataset.plan.skips_text else index
    columns = (taken.length, taken.grids, taken.targets)
    modules = flops_by_module(model.config, *columns, trains)
    rows = {name: flops * size / len(index) for name, flops in modules.items()}
    step = sum(rows.values())
    _print_table("FLOPs of a step of average samples", rows | {"all": step}, 1e12, "TF")
    print(f"  {data.total_steps:,} steps of {size} samples")
    if peak := peak_tflops(device_name(world), config.dtype):
        seconds = step / (world.size * peak * 1e12 * Setup.mfu)
        hours = seconds * data.total_steps / 3600
        print(f"  {seconds:.3f} s a step and {hours:,.1f} h in all, were MFU {Setup.mfu:g}")


def _print_memory(
    config: TrainConfig,
    world: World,
    batch: Batch,
    model: VisionLanguageModel,
    trains: Collection[str],
) -> None:
    """Predicted, of one device under the run's engine."""
    size = SIZES[config.dtype]
    load = Load(len(batch.input_ids), len(batch.targets), len(batch.patches))
    rows = state_of(config, world, model, trains)
    rows |= peak_activations(model.config, load, trains, priced_recompute(config), size)
    title = (
        f"memory of a device, predicted, with a micro-batch of {load.tokens:,} tokens, "
        f"{load.targets:,} targets and {load.patches:,} patches"
    )
    _print_table(title, rows | {"all": sum(rows.values())}, 1e9, "GB")


def _print_table(title: str, rows: dict[str, float], unit: float, name: str) -> None:
    print(f"\n{title}")
    for row, value in rows.items():
        print(f"  {row:42}{value / unit:11,.4g} {name}")

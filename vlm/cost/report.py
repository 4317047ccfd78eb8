"""Everything that a training step of a model costs, as one record and as tables.

MFU, model FLOPs utilisation, is useful FLOPs per second over the device's peak (PaLM,
arXiv:2204.02311, appendix B); `vlm/cost/flops.py` says what is useful.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from vlm.config import VLMConfig
from vlm.cost.flops import (
    CONVENTION,
    flops_by_module,
    parameter_counts,
    parameters_by_module,
    sample_flops_array,
    text_flops,
    vision_flops,
)
from vlm.cost.memory import FLOAT32, Load, peak_activations, saved_activations, training_state
from vlm.cost.samples import Samples
from vlm.cost.trained import PARTS
from vlm.recompute import Policies, Policy

STAGES = {1: ("aligner",), 2: PARTS}
"""Stage -> the parts that train in it."""
SIZES = {"bfloat16": 2, "float32": 4}
"""Bytes per value."""
LONGEST, LARGEST_IMAGE = 8192, (1, 64, 80)
"""The recipe's max_length, in tokens, and a grid of its max_pixels, in patches."""


@dataclass(frozen=True)
class Setup:
    """How the model is trained; the defaults are the recipe's."""

    stage: Literal[1, 2]
    gpus: int = 8
    recompute: Policy = "full"
    """Of the language model's blocks."""
    vit_recompute: Policy | None = None
    """Of the ViT's; None: the same."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    per_device_train_batch_size: int = 2
    """Samples in a micro-batch."""
    global_batch_size: int | None = None
    """Samples per optimiser step; None: a micro-batch x 8 accumulated x gpus."""
    peak_tflops: float | None = None
    """Of one GPU in `dtype`; None where it is not known: then no time is predicted."""
    mfu: float = 0.5
    seconds_per_flop: dict[str, float] | None = None
    """Of each module, as `vlm/cost/calibrate.py` measures them; used instead of peak and MFU."""

    @property
    def policies(self) -> Policies:
        return self.vit_recompute or self.recompute, self.recompute

    @property
    def samples_per_step(self) -> int:
        return self.global_batch_size or 8 * self.per_device_train_batch_size * self.gpus

    @property
    def micro_batches(self) -> int:
        """Per GPU and step."""
        return -(-self.samples_per_step // (self.per_device_train_batch_size * self.gpus))


def make_report(config: VLMConfig, samples: Samples, setup: Setup) -> dict:
    """Bytes, FLOPs and seconds; a step is made of average samples, a micro-batch of the largest."""
    trains, size = STAGES[setup.stage], SIZES[setup.dtype]
    parameters = parameter_counts(config)
    total, trained = sum(parameters.values()), sum(parameters[part] for part in trains)
    columns = samples.lengths, samples.grids, samples.owners, samples.targets
    each = sample_flops_array(config, *columns, trains)
    scale = setup.samples_per_step / len(samples)
    modules = flops_by_module(config, samples.lengths, samples.grids, samples.targets, trains)
    step_flops = {name: flops * scale for name, flops in modules.items()}
    tokens = int(samples.lengths.sum())
    visual = int(samples.patches.sum()) // config.vision.merge_unit
    load = largest_micro_batch(config, samples, setup)
    state = training_state(total, trained, setup.gpus, size)
    activations = peak_activations(config, load, trains, setup.policies, size)
    seconds = None
    if setup.seconds_per_flop:
        each_module = (setup.seconds_per_flop[name] * n for name, n in step_flops.items())
        seconds = sum(each_module) / setup.gpus
    elif setup.peak_tflops:
        rate = setup.gpus * setup.peak_tflops * 1e12 * setup.mfu
        seconds = sum(step_flops.values()) / rate
    return {
        "convention": CONVENTION,
        "setup": asdict(setup),
        "parameters": parameters_by_module(config) | {"all": total, "trained": trained},
        "unit_flops": {
            "forward": unit_flops(config, ()),
            f"stage {setup.stage}": unit_flops(config, trains),
        },
        "samples": {
            "count": len(samples),
            "tokens": tokens,
            "visual tokens": visual,
            "target tokens": int(samples.targets.sum()),
            "FLOPs": float(each.sum()),
            "mean tokens": tokens / len(samples),
            "mean FLOPs": float(each.mean()),
            "most tokens": int(samples.lengths.max()),
            "most FLOPs": float(each.max()),
        },
        "step": {
            "samples": setup.samples_per_step,
            "micro-batches per GPU": setup.micro_batches,
            "tokens": tokens * scale,
            "FLOPs": sum(step_flops.values()),
            "FLOPs by module": step_flops,
            "seconds": seconds,
            "tokens per second": tokens * scale / seconds if seconds else None,
        },
        "micro_batch": asdict(load),
        "memory": {
            "training state": state,
            "activations": activations,
            "total": sum(state.values()) + sum(activations.values()),
        },
        "communication": communication(trained, setup),
    }


def unit_flops(config: VLMConfig, trains: tuple[str, ...]) -> dict[str, float]:
    """Useful FLOPs of one unit of each module, for the recipe's longest sample and largest
    image."""
    text = text_flops(config.text, LONGEST, LONGEST, trains)
    vision = vision_flops(config.vision, *LARGEST_IMAGE, trains)
    t, h, w = LARGEST_IMAGE
    visual = t * h * w // config.vision.merge_unit
    return {
        "decoder linear, per token": text["decoder linear"] / LONGEST,
        f"causal attention, per token of {LONGEST:,}": text["causal attention"] / LONGEST,
        "head, per target token": text["head"] / LONGEST,
        f"vision tower, per patch of {h} x {w}": vision["vision tower"] / (t * h * w),
        f"vision tower, per visual token of {h} x {w}": vision["vision tower"] / visual,
        "merger, per visual token": vision["merger"] / visual,
    }


def largest_micro_batch(config: VLMConfig, samples: Samples, setup: Setup) -> Load:
    """That of the samples which leave the most bytes for the backward pass."""
    each = Load(samples.lengths, samples.targets, samples.patches)
    trains, size = STAGES[setup.stage], SIZES[setup.dtype]
    saved = sum(saved_activations(config, each, trains, setup.policies, size).values())
    # a sample stands for more of its kind where fewer are given
    worst = np.resize(np.argsort(saved)[::-1], setup.per_device_train_batch_size)
    return Load(*(int(counts[worst].sum()) for counts in (each.tokens, each.targets, each.patches)))


def communication(trained: int, setup: Setup) -> dict[str, int]:
    """Bytes that each GPU sends in a step of ZeRO-2 (arXiv:1910.02054, section 7), around a ring.

    Gradients travel in float32 after every micro-batch. A reduce-scatter is enough; DeepSpeed's
    default (`use_multi_rank_bucket_allreduce`) is an all-reduce, which sends twice as much.
    """
    once = trained * (setup.gpus - 1) // setup.gpus
    return {
        "gradients, if reduce-scattered": FLOAT32 * once * setup.micro_batches,
        "gradients, all-reduced as by DeepSpeed": 2 * FLOAT32 * once * setup.micro_batches,
        "updated weights, all-gathered": SIZES[setup.dtype] * once,
    }


def print_report(report: dict) -> None:
    """The record as tables; GB are 10^9 bytes."""
    setup, step, memory = report["setup"], report["step"], report["memory"]
    _table("parameters", report["parameters"], 1e6, "M", 3)
    columns = report["unit_flops"]
    print(f"\nFLOPs of a unit, in GF {''.join(f'{name:>14}' for name in columns):>48}")
    for name in columns["forward"]:
        figures = "".join(f"{column[name] / 1e9:14.4f}" for column in columns.values())
        print(f"  {name:42}{figures}")
    print("\nsamples")
    for name, value in report["samples"].items():
        print(f"  {name:42}{value / 1e12:11.3f} TF" if "FLOPs" in name else _count(name, value))
    title = f"step of {step['samples']} samples, {step['tokens']:,.0f} tokens: FLOPs"
    _table(title, step["FLOPs by module"] | {"all": step["FLOPs"]}, 1e12, "TF", 3)
    _table(
        f"memory of a GPU: training state, {setup['gpus']} in all, {setup['dtype']}",
        memory["training state"],
        1e9,
        "GB",
        2,
    )
    load, recompute = report["micro_batch"], setup["recompute"]
    if setup["vit_recompute"]:
        recompute += f", of the ViT {setup['vit_recompute']}"
    title = (
        f"memory of a GPU: activations of {load['tokens']:,} tokens, {load['targets']:,} targets, "
        f"{load['patches']:,} patches, recompute {recompute}"
    )
    _table(title, memory["activations"], 1e9, "GB", 2)
    print(f"  {'training state and activations':42}{memory['total'] / 1e9:11.2f} GB")
    if setup["gpus"] > 1:
        title = f"sent by a GPU in a step of {step['micro-batches per GPU']} micro-batches"
        _table(title, report["communication"], 1e9, "GB", 2)
    if step["seconds"]:
        at = f"at an MFU of {setup['mfu']:g} of {setup['peak_tflops'] or 0:g} TFLOP/s a GPU"
        if setup["seconds_per_flop"]:
            at = "at the speeds that were measured"
        print(
            f"\npredicted: {step['seconds']:.3f} s a step, {step['tokens per second']:,.0f} "
            f"tokens/s {at}"
        )
    else:
        print("\nno time is predicted without --device, --peak_tflops or --coefficients")
    print(f"({report['convention']})")


def _table(title: str, rows: dict[str, float], unit: float, name: str, digits: int) -> None:
    print(f"\n{title}")
    for row, value in rows.items():
        print(f"  {row:42}{value / unit:11,.{digits}f} {name}")


def _count(name: str, value: float) -> str:
    return f"  {name:42}{value:11,.0f}"

"""Activation checkpointing policies: bytes kept, the peak, and the time of a micro-batch.

    python bench/recompute.py                # a table, and bench/results/recompute.json

A model with the 8B hybrid's proportions at an eighth of its width, three layers of each tower, runs
forward and backward over one micro-batch with an image, in float32 on a CPU, in bfloat16 on an
NVIDIA GPU. Bytes are the allocator's, beside weights and gradients; kept is what the forward pass
leaves for the backward pass. Times are medians of rounds in which the policies take turns: on a
CPU of processor time, on one thread.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlm.batch import Batch
from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost import PARTS
from vlm.cost.memory import Load, peak_activations, saved_activations
from vlm.data.collate import collate
from vlm.data.processor import Example
from vlm.loss import cross_entropy
from vlm.model import VisionLanguageModel, initialise
from vlm.recompute import Policy

ROUNDS = 9
TOKENS, TARGETS, GRID = 1024, 128, (1, 32, 32)
VISION = VisionConfig(
    depth=3, hidden_size=160, num_heads=4, intermediate_size=428, out_hidden_size=512,
    fullatt_block_indexes=(1,),
)  # fmt: skip
TEXT = TextConfig(
    vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=1, head_dim=128, rope_theta=1e6,
    mrope_section=(16, 24, 24),
)  # fmt: skip
CONFIG = VLMConfig(VISION, TEXT, 2000, 2001, 2002, 2003)
ON_CUDA = torch.cuda.is_available()


def main() -> None:
    torch.set_num_threads(1)
    dtype, device = (torch.bfloat16, "cuda") if ON_CUDA else (torch.float32, "cpu")
    model = VisionLanguageModel(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    model.to(device, dtype)
    for parameter in model.parameters():  # gradients leave at once, as they do under ZeRO
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = micro_batch().to(device)

    def forward() -> Tensor:
        return cross_entropy(model(batch), model.head_weight, batch.targets, None)[0]

    def step() -> None:
        forward().backward()

    rows, seconds = {}, {policy: [] for policy in get_args(Policy)}
    load = Load(TOKENS, TARGETS, GRID[0] * GRID[1] * GRID[2])
    for policy in get_args(Policy):
        model.set_recompute(policy, policy)
        step()
        priced = CONFIG, load, PARTS, (policy, policy), dtype.itemsize
        rows[policy] = {
            "kept MB": megabytes(measure(forward)[0]),
            "predicted kept MB": megabytes(sum(saved_activations(*priced).values())),
            "peak MB": megabytes(measure(step)[1]),
            "predicted peak MB": megabytes(sum(peak_activations(*priced).values())),
        }
    for _ in range(ROUNDS):
        for policy in seconds:
            model.set_recompute(policy, policy)
            seconds[policy].append(seconds_of(step))
    medians = {policy: statistics.median(times) for policy, times in seconds.items()}
    for policy, row in rows.items():
        ratio = medians[policy] / medians["none"]
        row |= {"seconds": round(medians[policy], 3), "times that of none": round(ratio, 3)}
    record = {
        "machine": torch.cuda.get_device_name() if ON_CUDA else platform.machine(),
        "torch": torch.__version__, "dtype": str(dtype),
        "tokens": TOKENS, "patches": load.patches, "policies": rows,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "recompute.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{'':10}" + "".join(f"{name:>19}" for name in rows["none"]))
    for policy, row in rows.items():
        print(f"{policy:10}" + "".join(f"{value:19}" for value in row.values()))


def megabytes(count: int) -> float:
    return round(int(count) / 1e6, 2)


def seconds_of(step: Callable[[], None]) -> float:
    clock = time.perf_counter if ON_CUDA else time.process_time
    began = clock()
    step()
    if ON_CUDA:
        torch.cuda.synchronize()
    return clock() - began


def micro_batch() -> Batch:
    """One sample with one image."""
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    patches = GRID[0] * GRID[1] * GRID[2]
    ids[: patches // VISION.merge_unit] = CONFIG.image_token_id
    targets = torch.full((TOKENS,), -100)
    targets[-TARGETS:] = 1
    pixels = torch.randint(0, 256, (patches, VISION.patch_dim), dtype=torch.uint8)
    positions = torch.arange(TOKENS).expand(3, -1)
    return collate([Example("x", ids, targets, None, positions, pixels, (GRID,))], CONFIG)


def measure(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that `work` allocates: those that its result keeps, and the most at any time."""
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        held = torch.cuda.memory_allocated() - before
        del result
        return held, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = profiler.profiler.kineto_results.events()
    del result
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


if __name__ == "__main__":
    main()

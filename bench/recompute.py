"""Activation checkpointing policies: bytes kept, the peak, and the time of a micro-batch.

    python -m bench.recompute

A model with the 8B hybrid's proportions at an eighth of its width, three layers of each tower, runs
forward and backward over one micro-batch with an image, in float32 on a CPU, in bfloat16 on an
NVIDIA GPU. Bytes are the allocator's, beside weights and gradients; kept is what the forward pass
leaves for the backward pass; predicted are those of vlm/cost. Times are medians of rounds in which
the policies take turns: on a CPU of processor time, on one thread.
"""

import sys
import time
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from bench.common import (
    allocated,
    arguments,
    interleaved,
    print_table,
    ratios,
    seconds,
    summary,
    write_result,
)
from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost import PARTS
from vlm.cost.memory import Load, peak_activations, saved_activations
from vlm.cost.samples import Samples, micro_batch
from vlm.gradients import drop_gradients
from vlm.loss import cross_entropy
from vlm.model import VisionLanguageModel, initialise
from vlm.recompute import Policy

ROUNDS = 9
SIZES = (1024, 128, 32)
"""Tokens, targets, and the side of the image in patches."""
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


def measure(tokens: int, targets: int, side: int, rounds: int) -> tuple[str, list[dict]]:
    """The dtype, and a row for each policy."""
    on_cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if on_cuda else (torch.float32, "cpu")
    model = VisionLanguageModel(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    model.to(device, dtype)
    drop_gradients(model)
    sample = Samples.of([(tokens, targets, [[1, side, side]])])
    batch = micro_batch(CONFIG, sample).to(device)

    def forward() -> Tensor:
        return cross_entropy(model(batch), model.head_weight, batch.targets, None)[0]

    def step() -> None:
        forward().backward()

    clock = time.perf_counter if on_cuda else time.process_time

    def seconds_of(policy: str) -> float:
        model.set_recompute(policy, policy)
        return seconds(step, clock)

    rows = []
    load = Load(tokens, targets, side**2)
    for policy in get_args(Policy):
        model.set_recompute(policy, policy)
        step()
        priced = CONFIG, load, PARTS, (policy, policy), dtype.itemsize
        rows.append(
            {
                "policy": policy,
                "kept MB": megabytes(allocated(forward)[0]),
                "predicted kept MB": megabytes(sum(saved_activations(*priced).values())),
                "peak MB": megabytes(allocated(step)[1]),
                "predicted peak MB": megabytes(sum(peak_activations(*priced).values())),
            }
        )
    policies = get_args(Policy)
    taken = interleaved(rounds, {p: lambda p=p: seconds_of(p) for p in policies})
    for row in rows:
        times = taken[row["policy"]]
        row |= {"seconds": summary(times), "times that of none": ratios(times, taken["none"])}
    return str(dtype), rows


def megabytes(count: int) -> float:
    return round(int(count) / 1e6, 2)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("recompute", __doc__).parse_args(given)
    torch.set_num_threads(1)
    sizes, rounds = ((128, 16, 8), 1) if options.quick else (SIZES, ROUNDS)
    dtype, rows = measure(*sizes, rounds)
    print_table(rows)
    write_result(
        "recompute",
        options,
        what=f"bytes and time of a micro-batch of {sizes[0]} tokens and {sizes[2] ** 2} patches in "
        f"{dtype} under each recompute policy, beside what vlm/cost predicts",
        target={"predicted memory": "within 5 % of the real one"},
        figures=rows,
        spread=f"least and most of {rounds} interleaved rounds; bytes are the same in every run",
        refuted_by="python -m bench.recompute, on a CPU or GPU: a peak more than 5 % from the "
        "predicted one",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

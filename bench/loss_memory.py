"""The loss at Qwen3's vocabulary: its peak memory as targets grow, and its speed beside torch's.

    python -m bench.loss_memory

Both sides compute the summed cross entropy of N targets and the gradients of hidden states and
head. torch's holds all logits.

- Memory is the most that is allocated beside inputs and gradients, over all 151,936 classes, in
  bfloat16, as a model trains, and in float32. The hidden size, of which it holds nothing, is small.
- Speed is at the 8B's hidden size, 4,096, and at four chunks of targets: in float32, since a CPU
  multiplies bfloat16 many times slower, by the processor time of one thread, and over a
  sixty-fourth of the vocabulary, to which all of the time on both sides is in proportion. On an
  NVIDIA GPU it is in bfloat16 and over all classes.
"""

import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import (
    ROUNDS,
    allocated,
    arguments,
    interleaved,
    print_table,
    ratios,
    seconds,
    summary,
    write_result,
)
from vlm.loss import cross_entropy_sum

VOCABULARY = 151_936
NARROW, WIDTH = 16, 4096
"""Hidden sizes of the measure of memory and of speed."""
ROWS = (4096, 8192)
DTYPES = (torch.bfloat16, torch.float32)
COMPARED = 4096
"""Targets of the comparison of speed."""
ON_GPU = torch.cuda.is_available()
CLASSES = VOCABULARY if ON_GPU else VOCABULARY // 64
"""Of the comparison of speed."""
TARGET_GB = 1.3


def naive(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")


def step_of(
    loss: Callable[..., Tensor], rows: int, vocabulary: int, width: int, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Computes both gradients, of hidden states and of the head, from the same random inputs."""
    device = "cuda" if ON_GPU else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype)
    head = torch.randn(vocabulary, width, generator=generator).div_(width**0.5).to(device, dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    of = hidden.requires_grad_(), head.requires_grad_()
    return lambda: torch.autograd.grad(loss(*of, targets), of)


def memory_of(rows: Sequence[int], vocabulary: int) -> list[dict]:
    """A row for each dtype and number of targets."""
    table = []
    for dtype in DTYPES:
        for count in rows:
            step = step_of(cross_entropy_sum, count, vocabulary, NARROW, dtype)
            gradients, peak = allocated(step)
            row = {"dtype": str(dtype).removeprefix("torch."), "targets": count}
            row["all logits, GB"] = round(4 * count * vocabulary / 1e9, 2)
            table.append(row | {"ours, peak GB": round((peak - gradients) / 1e9, 3)})
    return table


def speed_of(compared: int, classes: int, width: int, rounds: int) -> dict:
    """Seconds of both sides, after a look whether their gradients agree."""
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    steps = {
        name: step_of(loss, compared, classes, width, dtype)
        for name, loss in (("ours", cross_entropy_sum), ("torch", naive))
    }
    for ours, theirs in zip(*(step() for step in steps.values()), strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item()):
            sys.exit(f"gradients differ by {(ours - theirs).abs().max()}")
    clock = time.perf_counter if ON_GPU else time.process_time
    measures = {name: lambda s=step: seconds(s, clock) for name, step in steps.items()}
    taken = interleaved(rounds, measures)
    setting = {"dtype": str(dtype).removeprefix("torch."), "targets": compared}
    setting |= {"classes": classes, "hidden size": width}
    found = {f"{name}, s": summary(taken[name]) for name in taken}
    return setting | found | {"times as fast": ratios(taken["torch"], taken["ours"])}


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("loss_memory", __doc__).parse_args(given)
    torch.set_num_threads(1)
    rows, vocabulary, speed = ROWS, VOCABULARY, (COMPARED, CLASSES, WIDTH, ROUNDS)
    if options.quick:
        rows, vocabulary, speed = (64, 128), 512, (128, 512, 64, 1)
    memory, compared = memory_of(rows, vocabulary), speed_of(*speed)
    print_table(memory)
    print_table([compared])
    write_result(
        "loss_memory",
        options,
        what=f"peak memory of the loss beside inputs and gradients for N targets over "
        f"{vocabulary:,} classes; and torch's time / ours, both gradients included, at "
        f"{speed[0]:,} targets, {speed[1]:,} classes and a hidden size of {speed[2]:,}",
        target={
            "peak": f"< {TARGET_GB} GB at {COMPARED:,} targets, and not growing with them",
            "speed": ">= 1x torch's",
        },
        figures={"memory": memory, "speed": compared},
        spread=f"least and most of {speed[3]} interleaved rounds; bytes are the same in every run",
        refuted_by="python -m bench.loss_memory, on a CPU or GPU: a larger peak, or a ratio below "
        "1 on an idle machine",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

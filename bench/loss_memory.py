"""The loss at Qwen3's vocabulary: its peak memory as targets grow, and its speed beside torch's.

    python -m bench.loss_memory

Both sides compute the summed cross entropy of N targets over 151,936 classes and the gradients of
hidden states and head, in float32 on a CPU, in bfloat16 on an NVIDIA GPU. torch's holds all logits.
Memory is what is allocated beside the inputs, the gradients among it. The hidden size is small
(64), so that the products, which are the same on both sides, hide little of the rest.
"""

import sys
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

VOCABULARY, WIDTH = 151_936, 64
ROWS = (1024, 2048, 4096, 8192)
COMPARED = 4096
"""Targets of the comparison of speed; torch's takes 7.5 GB at so many in float32."""
TARGET_GB = 1.3


def naive(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")


def inputs(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    on_cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if on_cuda else (torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    head = torch.randn(vocabulary, WIDTH, generator=generator).mul_(0.1).to(device, dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    return hidden, head.requires_grad_(), targets


def step_of(loss: Callable[..., Tensor], rows: int, vocabulary: int) -> Callable[[], tuple]:
    hidden, head, targets = inputs(rows, vocabulary)
    return lambda: torch.autograd.grad(loss(hidden, head, targets), (hidden, head))


def measure(
    rows: Sequence[int], compared: int, vocabulary: int, rounds: int
) -> tuple[list[dict], dict]:
    """Memory for each number of targets, and seconds for one of them."""
    table = []
    for count in rows:
        found = {"targets": count, "logits GB": round(4 * count * vocabulary / 1e9, 2)}
        peak = allocated(step_of(cross_entropy_sum, count, vocabulary))[1]
        table.append(found | {"ours, peak GB": round(peak / 1e9, 3)})
    steps = {
        name: step_of(loss, compared, vocabulary)
        for name, loss in (("ours", cross_entropy_sum), ("naive", naive))
    }
    for ours, theirs in zip(*(step() for step in steps.values()), strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item()):
            sys.exit(f"gradients differ by {(ours - theirs).abs().max()}")
    taken = interleaved(rounds, {name: lambda s=step: seconds(s) for name, step in steps.items()})
    speed = {"targets": compared} | {f"{name}, s": summary(taken[name]) for name in taken}
    return table, speed | {"times as fast": ratios(taken["naive"], taken["ours"])}


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("loss_memory", __doc__).parse_args(given)
    torch.set_num_threads(1)
    sizes = ((64, 128), 128, 512, 1) if options.quick else (ROWS, COMPARED, VOCABULARY, ROUNDS)
    memory, speed = measure(*sizes)
    print_table(memory)
    print_table([speed])
    write_result(
        "loss_memory",
        options,
        what=f"peak memory of the loss and its gradients for N targets over {sizes[2]:,} classes, "
        f"and torch's time / ours at {sizes[1]:,}",
        target={
            "peak": f"< {TARGET_GB} GB at {COMPARED:,} targets, and not growing with them",
            "speed": ">= 1x torch's",
        },
        figures={"memory": memory, "speed": speed},
        spread=f"least and most of {sizes[3]} interleaved rounds; bytes are the same in every run",
        refuted_by="python -m bench.loss_memory, on a CPU or GPU: a larger peak, or a ratio below "
        "1 on an idle machine",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

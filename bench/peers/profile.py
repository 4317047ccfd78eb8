"""Where our steps' time goes: the trace that `--profile` writes, by kind of operator."""

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.common import seconds

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "optimiser and clipping": ("aten::_fused_adamw", "aten::linalg_vector_norm", "aten::_foreach"),
    "copies, gathers and fills": (
        "aten::cat",
        "aten::copy_",
        "aten::index",
        "aten::_index_put_impl_",
        "aten::fill_",
        "aten::embedding",
    ),
}
"""Kind -> how its operators' names begin; the other operators are `POINTWISE`."""
POINTWISE = "pointwise operations and sums"
REST = "between operators"
SIDE = 1024
"""Of the matrices whose product is as fast as this machine's get."""


def shares(trace: Path) -> dict[str, float]:
    """Kind -> share of the traced steps' time; what no operator takes is `REST`."""
    with gzip.open(trace, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    whole = sum(e["dur"] for e in events if e["name"].startswith("ProfilerStep"))
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["tid"]].append(event)
    found: Counter[str] = Counter()
    for operators in threads.values():
        for name, own in _own_times(operators):
            found[kind_of(name)] += own
    found[REST] = whole - found.total()
    return {kind: round(time / whole, 3) for kind, time in found.most_common()}


def kind_of(operator: str) -> str:
    kinds = (kind for kind, begins in KINDS.items() if operator.startswith(begins))
    return next(kinds, POINTWISE)


def _own_times(operators: Sequence[dict]) -> list[tuple[str, float]]:
    """Name and time of each operator of a thread, without those that it calls."""
    open_ones: list[int] = []
    ordered = sorted(operators, key=lambda event: (event["ts"], -event["dur"]))
    own = [event["dur"] for event in ordered]
    for number, event in enumerate(ordered):
        while open_ones and _end(ordered[open_ones[-1]]) <= event["ts"]:
            open_ones.pop()
        if open_ones:
            own[open_ones[-1]] -= event["dur"]
        open_ones.append(number)
    return [(event["name"], time) for event, time in zip(ordered, own, strict=True)]


def _end(event: dict) -> float:
    return event["ts"] + event["dur"]


def peak_flops(clock) -> float:
    """FLOPs a second, by `clock`, of a large product of float32 on this process's threads."""
    a, b = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    return 2 * SIDE**3 / min(seconds(lambda: a @ b, clock) for _ in range(8))

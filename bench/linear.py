"""The cost of a micro-batch grows in proportion to its tokens and patches.

    python -m bench.linear

Micro-batches of equal samples, up to the default budgets: of 512 tokens of text each, up to 8,192
tokens; of an image of 1,024 patches and 64 tokens of text each, up to 20,480 patches. Measured is
the time of a forward and a backward pass of a small model on one thread of a CPU, or on a GPU;
counted are the FLOPs of the 8B hybrid's stage 2 on the meta device. Off is how far a point lies
from the straight line through all points (least squares), against the largest point.
"""

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from bench.common import (
    ROUNDS,
    arguments,
    interleaved,
    print_table,
    result_path,
    seconds,
    summary,
    write_result,
)
from bench.make_lengths import hybrid_8b
from bench.meta import count, on_meta
from bench.plot import write_chart
from vlm.batch import Batch
from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost.samples import Samples, micro_batch
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel, initialise

TEXT, IMAGE = 512, (1, 32, 32)
TOKENS, PATCHES = 8192, 20480
"""The default budgets."""
STEPS = 6
"""Points of a line."""
COUNTED = (1, 3, 6)
"""Those of them, of STEPS, at which torch counts."""
OFF = 0.1
"""Of the largest point: a line whose points are as near is called straight."""


def small() -> VLMConfig:
    vision = VisionConfig(2, 64, 2, 172, 128, (1,))
    text = TextConfig(512, 128, 384, 2, 2, 1, 64, 1e6, mrope_section=(8, 12, 12))
    return VLMConfig(vision, text, 500, 501, 502, 503)


def samples_of(what: str, size: int) -> Samples:
    """Of so many tokens or patches."""
    if what == "tokens":
        return Samples.of([(TEXT, TEXT // 4, [])] * (size // TEXT))
    patches = math.prod(IMAGE)
    return Samples.of([(patches // 4 + 64, 32, [list(IMAGE)])] * (size // patches))


def sizes_of(what: str, steps: int, share: float) -> list[int]:
    """Evenly up to a share of the budget, in whole samples."""
    most, unit = (TOKENS, TEXT) if what == "tokens" else (PATCHES, math.prod(IMAGE))
    sizes = (most * share * n / steps for n in range(1, steps + 1))
    return sorted({max(unit, round(size / unit) * unit) for size in sizes})


def straightness(points: Mapping[int, float]) -> dict[str, float]:
    """How far the points lie from their line, and the line's value at 0, against the largest."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    slope, start = np.polyfit(x, y, 1)
    off = np.abs(y - (start + slope * x)).max()
    return {"off": round(off / y.max(), 4), "at 0": round(start / y.max(), 4)}


def timed(batches: Mapping[int, Batch], rounds: int) -> dict[int, dict[str, float]]:
    """Seconds of a forward and a backward pass over each batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VisionLanguageModel(small())
    initialise(model, torch.Generator().manual_seed(0))
    model.to(device)
    moved = {size: batch.to(device) for size, batch in batches.items()}

    def step(batch: Batch) -> None:
        cross_entropy_sum(model(batch), model.head_weight, batch.targets).backward()

    for batch in moved.values():
        step(batch)  # memory that is asked for the first time takes longer
    measures = {
        size: lambda batch=batch: seconds(lambda: step(batch)) for size, batch in moved.items()
    }
    return {size: summary(taken, 4) for size, taken in interleaved(rounds, measures).items()}


def counted(config: VLMConfig, what: str, sizes: Sequence[int]) -> dict[int, int]:
    """FLOPs of stage 2."""
    with torch.device("meta"):
        model = VisionLanguageModel(config)

    def flops(size: int) -> int:
        batch = on_meta(micro_batch(config, samples_of(what, size)))
        return count(lambda: cross_entropy_sum(model(batch), model.head_weight, batch.targets))

    return {size: flops(size) for size in sizes}


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("linear", __doc__).parse_args(given)
    torch.set_num_threads(1)
    steps, share, rounds, config = STEPS, 1.0, ROUNDS, hybrid_8b()
    if options.quick:
        steps, share, rounds, config = 2, 0.25, 1, small()
    rows, lines = [], {}
    for what in ("tokens", "patches"):
        sizes = sizes_of(what, steps, share)
        batches = {size: micro_batch(small(), samples_of(what, size)) for size in sizes}
        times = timed(batches, rounds)
        medians = {size: found["median"] for size, found in times.items()}
        marks = [sizes[n - 1] for n in COUNTED if n <= len(sizes)]
        flops = counted(config, what, marks)
        for kind, points in (("measured", medians), ("counted", flops)):
            rows.append(
                {"of": what, "kind": kind, "from": min(points), "to": max(points)}
                | straightness(points)
                | {
                    "points": {size: times[size] for size in points}
                    if kind == "measured"
                    else points
                }
            )
            most = max(points), max(points.values())
            name = f"{kind}, up to {most[0]:,} {what}"
            lines[name] = [(x / most[0], y / most[1]) for x, y in points.items()]
    print_table([{key: value for key, value in row.items() if key != "points"} for row in rows])
    if path := result_path("linear", options):
        labels = ("Cost of a micro-batch", "share of the largest size", "share of its cost")
        write_chart(path.with_suffix(".svg"), *labels, lines)
    write_result(
        "linear",
        options,
        what="cost of a micro-batch of equal samples by its tokens and by its patches: seconds of "
        "a small model, FLOPs of the 8B hybrid; how far points lie from a straight line",
        target={
            "growth": f"linear up to {TOKENS:,} tokens and {PATCHES:,} patches: points at "
            f"most {OFF:.0%} of the largest off a straight line"
        },
        figures=rows,
        spread=f"least and most of {rounds} interleaved rounds; a count is always the same",
        refuted_by="python -m bench.linear on an idle machine: points that bend away from the line",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The image pipeline after decoding, beside transformers' default processor, on one thread.

    python -m bench.image

Ours resizes and cuts into uint8 patches, which the device normalises; theirs, the torchvision
class that `Qwen2VLImageProcessor` is by default, resizes, normalises and cuts. Both are given the
same decoded pictures, in blocks in turn, and their levels are compared first. Exits where the
default class cannot be had, since transformers falls back to a slower one without a word. The
resize is one and the same kernel on both sides, and bounds what can be won.
"""

import statistics
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.common import (
    GOLDEN_MODEL,
    ROUNDS,
    arguments,
    interleaved,
    print_table,
    ratios,
    seconds,
    write_result,
)
from vlm.config import VisionConfig
from vlm.data.image import patchify, resize, smart_resize
from vlm.data.limits import Limits
from vlm.hf_config import read_config
from vlm.vision import normalise

SIZES = ((1200, 1600), (480, 640), (336, 336), (3000, 400), (1080, 1920))
"""Height and width: photographs, a screen, a page, a thumbnail."""
TARGET = 2.5
"""Times as fast as the default processor."""
BLOCK = 5
"""Runs in a row of either side, since a data worker runs nothing else either."""


def pictures(sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Smooth noise, the same in every run."""
    rng = np.random.default_rng(0)
    found = []
    for height, width in sizes:
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        found.append(np.array(Image.fromarray(coarse).resize((width, height), Image.BICUBIC)))
    return found


def ours(pixels: np.ndarray, config: VisionConfig, limits: Limits) -> Tensor:
    """(P, patch_dim) uint8."""
    factor = config.patch_size * config.spatial_merge_size
    size = smart_resize(*pixels.shape[:2], *limits.image_pixels, factor)
    return patchify(resize(torch.from_numpy(pixels), *size), config)


def default_processor(limits: Limits):
    from transformers import Qwen2VLImageProcessor

    if "TorchvisionBackend" not in (kind.__name__ for kind in Qwen2VLImageProcessor.__mro__):
        sys.exit("transformers gives its slow processor here; torchvision cannot be imported")
    least, most = limits.image_pixels
    return Qwen2VLImageProcessor(size={"shortest_edge": least, "longest_edge": most})


def repeated(work: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one run, out of BLOCK."""

    def block() -> None:
        for _ in range(BLOCK):
            work()

    return lambda: seconds(block) / BLOCK


def measure(sizes: Sequence[tuple[int, int]], rounds: int) -> list[dict]:
    """A row for each picture."""
    config, limits = read_config(GOLDEN_MODEL).vision, Limits()
    processor = default_processor(limits)
    rows = []
    for pixels in pictures(sizes):

        def mine(pixels=pixels) -> Tensor:
            return ours(pixels, config, limits)

        def theirs(pixels=pixels) -> Tensor:
            return processor(images=[pixels], return_tensors="pt")["pixel_values"]

        levels, expected = normalise(mine()), theirs()
        if levels.shape != expected.shape or not torch.allclose(levels, expected, atol=1e-6):
            sys.exit(f"levels of {pixels.shape} differ by {(levels - expected).abs().max()}")
        times = interleaved(rounds, {"ours": repeated(mine), "theirs": repeated(theirs)})
        rows.append(
            {
                "height": pixels.shape[0],
                "width": pixels.shape[1],
                "patches": len(levels),
                "ours_ms": round(1e3 * statistics.median(times["ours"]), 2),
                "theirs_ms": round(1e3 * statistics.median(times["theirs"]), 2),
                "ratio": ratios(times["theirs"], times["ours"]),
            }
        )
    return rows


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments("image", __doc__)
    parser.add_argument("--rounds", type=int, default=11, help=f"{ROUNDS} or more")
    options = parser.parse_args(given)
    sizes, rounds = (SIZES[1:3], 1) if options.quick else (SIZES, max(ROUNDS, options.rounds))
    torch.set_num_threads(1)
    rows = measure(sizes, rounds)
    own, other = (sum(row[key] for row in rows) for key in ("ours_ms", "theirs_ms"))
    print_table(rows)
    print(f"all: {other / own:.2f} times as fast; the target is {TARGET}")
    write_result(
        "image",
        options,
        what="time of transformers' default image processor (torchvision) / ours, after decoding, "
        "on one thread, to equal levels",
        target={"all pictures": f">= {TARGET} times as fast"},
        figures={"images": rows, "ratio_of_all": round(other / own, 2), "runs_in_a_round": BLOCK},
        spread=f"least and most of {rounds} interleaved rounds",
        refuted_by="python -m bench.image on an idle machine: another ratio, or levels that differ",
        packages=("transformers", "torchvision", "pillow"),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

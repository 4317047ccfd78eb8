"""The image pipeline after decoding, beside transformers' default processor, on one thread.

    python -m bench.image

Ours resizes and cuts into uint8 patches, which the device normalises; theirs, the torchvision
class that `Qwen2VLImageProcessor` is by default, resizes, normalises and cuts. Both are given the
same decoded pictures, in blocks in turn, and their levels are compared first. Exits where the
default class cannot be had, since transformers falls back to a slower one without a word. The
resize is one and the same kernel on both sides, and bounds what can be won.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from torch import Tensor

from vlm.checkpoint import write_json
from vlm.config import VisionConfig
from vlm.data.image import patchify, resize, smart_resize
from vlm.data.limits import Limits
from vlm.hf_config import read_config
from vlm.vision import normalise

ROOT = Path(__file__).parents[1]
TEST_MODEL = ROOT / "tests" / "golden" / "model"
SIZES = ((1200, 1600), (480, 640), (336, 336), (3000, 400), (1080, 1920))
"""Height and width: photographs, a screen, a page, a thumbnail."""
TARGET = 2.5
BLOCK = 5


def pictures() -> list[np.ndarray]:
    """Smooth noise, the same in every run."""
    rng = np.random.default_rng(0)
    found = []
    for height, width in SIZES:
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


def seconds(work: Callable[[], object]) -> float:
    """Of one run, out of BLOCK in a row: a data worker runs nothing else either."""
    started = time.perf_counter()
    for _ in range(BLOCK):
        work()
    return (time.perf_counter() - started) / BLOCK


def measure(repeats: int) -> dict:
    torch.set_num_threads(1)
    config, limits = read_config(TEST_MODEL).vision, Limits()
    processor = default_processor(limits)
    rows, load = [], os.getloadavg()[0]
    for pixels in pictures():

        def mine(pixels=pixels) -> Tensor:
            return ours(pixels, config, limits)

        def theirs(pixels=pixels) -> Tensor:
            return processor(images=[pixels], return_tensors="pt")["pixel_values"]

        levels, expected = normalise(mine()), theirs()
        if levels.shape != expected.shape or not torch.allclose(levels, expected, atol=1e-6):
            sys.exit(f"levels of {pixels.shape} differ by {(levels - expected).abs().max()}")
        times = [(seconds(mine), seconds(theirs)) for _ in range(repeats)]
        mine_all, theirs_all = zip(*times, strict=True)
        ratios = [other / own for own, other in times]
        rows.append(
            {
                "height": pixels.shape[0],
                "width": pixels.shape[1],
                "patches": len(levels),
                "ours_ms": round(1e3 * statistics.median(mine_all), 2),
                "theirs_ms": round(1e3 * statistics.median(theirs_all), 2),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
            }
        )
    own, other = (sum(row[key] for row in rows) for key in ("ours_ms", "theirs_ms"))
    return {
        "command": f"python -m bench.image --repeats {repeats}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "load_average_at_start": round(load, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
        },
        "beside": f"{type(processor).__name__} (torchvision backend)",
        "repeats": repeats,
        "runs_in_a_repeat": BLOCK,
        "levels": "equal",
        "images": rows,
        "ratio_of_all": round(other / own, 2),
        "target": TARGET,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.image", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=11, help="5 or more")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/image.json")
    options = parser.parse_args()
    result = measure(max(5, options.repeats))
    for row in result["images"]:
        size = f"{row['width']} x {row['height']}"
        low, high = row["ratio_spread"]
        print(
            f"{size:>12}: ours {row['ours_ms']:7.2f} ms, theirs {row['theirs_ms']:7.2f} ms, "
            f"{row['ratio']:.2f} times as fast ({low:.2f} to {high:.2f})"
        )
    print(f"all: {result['ratio_of_all']:.2f} times as fast; the target is {TARGET}")
    write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes the recorded length files, bench/lengths/*.npz: python -m bench.make_lengths

No data set is copied: sizes are drawn from distributions shaped like two kinds of data.

- caption: one image and one description. Photos are small (COCO's 640 x 480 and what lies around
  it), every fifth is larger than 1003520 pixels and is shrunk to that; descriptions as long as
  ShareGPT4V's (median 150 tokens). All of it is learnt.
- instruction: a fifth is text alone (median 350 tokens, a long tail up to 8192); the rest has one
  image, or two to four (one in twelve), photos, charts and documents; one to six turns, of which
  the answers are learnt.

Each file holds `lengths`, `targets`, `patches`, `images` (n,) int32, the `grids` (m, 3) int32 of
all images, and `costs` (n,) float64: useful FLOPs of stage 2 of the 8B hybrid by vlm/cost.
"""

from pathlib import Path

import numpy as np

from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost import PARTS, sample_flops
from vlm.data.image import smart_resize
from vlm.data.limits import Limits

FOLDER = Path(__file__).parent / "lengths"
SAMPLES = 20_000
MAX_LENGTH = 8192
WRAPPING = 26
"""Tokens of the default system prompt, the roles and the ends of turns; of each later turn 9."""


def hybrid_8b() -> VLMConfig:
    """Qwen2.5-VL-7B's tower under Qwen3-8B."""
    vision = VisionConfig(32, 1280, 16, 3420, 4096, (7, 15, 23, 31))
    text = TextConfig(151936, 4096, 12288, 36, 32, 8, 128, 1e6, mrope_section=(16, 24, 24))
    return VLMConfig(vision, text, 151655, 151656, 151652, 151653)


def grid(height: float, width: float, config: VLMConfig) -> tuple[int, int, int]:
    """Patches of an image of so many pixels, resized as the processor does."""
    vision = config.vision
    unit = vision.patch_size * vision.spatial_merge_size
    h, w = smart_resize(int(height), int(width), *Limits().image_pixels, unit)
    return 1, h // vision.patch_size, w // vision.patch_size


def photo(rng: np.random.Generator) -> tuple[float, float]:
    longer = 640.0 if rng.random() < 0.6 else float(np.clip(rng.lognormal(6.6, 0.55), 120, 4000))
    shorter = longer * float(rng.choice([0.5625, 0.667, 0.75, 1.0], p=[0.15, 0.25, 0.5, 0.1]))
    return (longer, shorter) if rng.random() < 0.3 else (shorter, longer)


def document(rng: np.random.Generator) -> tuple[float, float]:
    width = float(np.clip(rng.lognormal(7.0, 0.4), 400, 3000))
    return width * float(rng.uniform(0.6, 1.45)), width


def caption(rng: np.random.Generator, config: VLMConfig):
    words = int(np.clip(rng.lognormal(5.0, 0.5), 12, 900))
    return [grid(*photo(rng), config)], words + WRAPPING + 12, words


def instruction(rng: np.random.Generator, config: VLMConfig):
    if rng.random() < 0.2:
        words = int(np.clip(rng.lognormal(5.86, 1.1), 20, MAX_LENGTH))
        return [], min(words + WRAPPING, MAX_LENGTH), int(words * 0.7)
    images = 1 if rng.random() < 11 / 12 else int(rng.integers(2, 5))
    draw = photo if rng.random() < 0.65 else document
    turns = int(rng.integers(1, 7))
    asked = int(rng.lognormal(2.8, 0.6, turns).sum())
    answered = int(np.clip(rng.lognormal(3.6, 1.0, turns), 2, 900).sum())
    text = asked + answered + WRAPPING + 9 * (turns - 1)
    return [grid(*draw(rng), config) for _ in range(images)], text, answered


def main() -> None:
    config = hybrid_8b()
    for seed, make in enumerate((caption, instruction)):
        rng, rows = np.random.default_rng(seed), []
        while len(rows) < SAMPLES:
            grids, text, targets = make(rng, config)
            patches = sum(t * h * w for t, h, w in grids)
            length = text + patches // config.vision.merge_unit + 2 * len(grids)
            if length <= MAX_LENGTH:  # longer ones are dropped by the index
                cost = sample_flops(config, length, grids, targets, PARTS)
                rows.append((length, targets, patches, len(grids), cost, grids))
        *columns, costs, grids = zip(*rows, strict=True)
        names = ("lengths", "targets", "patches", "images")
        arrays = {n: np.array(c, np.int32) for n, c in zip(names, columns, strict=True)}
        print(make.__name__, {n: round(float(c.mean()), 1) for n, c in arrays.items()})
        arrays["grids"] = np.array([grid for of_one in grids for grid in of_one], np.int32)
        np.savez_compressed(FOLDER / f"{make.__name__}.npz", **arrays, costs=np.array(costs))


if __name__ == "__main__":
    main()

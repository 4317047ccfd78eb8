"""Stage 1 on one GPU: the merger of the 8B hybrid trains, with JPEGs decoded by workers.

    python -m bench.gpu_stage1

Random weights in bfloat16; JPEG files with noise in them, of the sizes of bench/lengths. The same
samples, a fifth of text alone, are gone through in four ways that take turns:

- naive: pairs padded to the longer one, every layer computed again in the backward pass, logits of
  all tokens in float32, text alone computed too (forward only, since it has no gradient);
- ours: packed, logits of target rows, no text alone, the fastest recompute policy that fits;
- compiled: the same with compiled blocks;
- cached: compiled, and what the merger reads comes from the files of `vlm/data/features.py`.

Each way has its own workers, which decode, resize and pack while the GPU computes; the time is that
of all samples from the first request to the last gradient, with the wait for the first micro-batch.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.common import arguments, interleaved, print_table, ratios, seconds, summary, write_result
from bench.gpu import (
    DEVICE,
    ON_GPU,
    PATCHES,
    SMALLER,
    TOKENS,
    Gradients,
    Sample,
    Size,
    area,
    compiled_twin,
    compiler,
    difference,
    flops_of,
    make_sample,
    micro_batch,
    naive,
    ours,
    packs,
    pairs,
    peak,
    random_model,
    recorded,
    set_fastest,
    shallow,
    speed,
    tiny,
)
from bench.make_lengths import hybrid_8b
from vlm.batch import Batch, Features
from vlm.config import VLMConfig
from vlm.cost import CONVENTION, vision_flops
from vlm.data.features import FeatureCache, FeatureWriter
from vlm.data.image import load_image, patchify, resize
from vlm.model import VisionLanguageModel
from vlm.vision import plan_vision

ROUNDS, SAMPLES, CHECKED = 5, 128, 24
TARGETS = {"ours": ">= 2.5x naive, >= 52 % of the peak, useful"}
TRAINS = ("aligner",)
LARGER = 1.4
"""Times as long are a file's sides as what the model sees."""
SAME = 1e-4
"""Relative difference of two float32 gradients that are the same but for rounding."""


@dataclass(frozen=True)
class Photos:
    """Samples whose images are files; what data workers hold."""

    config: VLMConfig
    sizes: list[Size]
    folder: Path

    def paths(self, number: int) -> list[Path]:
        return [self.folder / f"{number}-{i}.jpg" for i in range(len(self.sizes[number][2]))]

    def write(self) -> None:
        rng = np.random.default_rng(0)
        for number, (_, _, grids) in enumerate(self.sizes):
            for path, (_, h, w) in zip(self.paths(number), grids, strict=True):
                side = self.config.vision.patch_size * LARGER
                coarse = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((int(w * side), int(h * side)))
                image.save(path, quality=90)

    def decoded(self, number: int) -> Tensor:
        """(P, patch_dim) uint8."""
        vision, grids = self.config.vision, self.sizes[number][2]
        parts = [torch.zeros(0, vision.patch_dim, dtype=torch.uint8)]
        for path, (_, h, w) in zip(self.paths(number), grids, strict=True):
            pixels = resize(load_image(path), h * vision.patch_size, w * vision.patch_size)
            parts.append(patchify(pixels, vision))
        return torch.cat(parts)

    def keys(self, number: int, cache: FeatureCache) -> list[str]:
        grids = self.sizes[number][2]
        return [
            cache.key(path, (grid,)) for path, grid in zip(self.paths(number), grids, strict=True)
        ]

    def sample(self, number: int, cache: FeatureCache | None) -> Sample:
        size = self.sizes[number]
        if cache is None:
            return make_sample(self.config, size, number, self.decoded(number))
        keys = zip(self.keys(number, cache), size[2], strict=True)
        rows = [cache.get(key, area([grid])) for key, grid in keys]
        return make_sample(self.config, size, number, features=torch.cat(rows))

    @torch.no_grad()
    def fill(self, cache: FeatureCache, model: VisionLanguageModel) -> None:
        """Keep what the ViT makes of each sample's images."""
        writer = FeatureWriter(cache, limit=1 << 40)
        for number, (_, _, grids) in enumerate(self.sizes):
            if grids:
                plan = plan_vision(grids, self.config.vision).to(DEVICE)
                rows = model.visual.trunk(self.decoded(number).to(DEVICE), plan)
                counts = [area([grid]) for grid in grids]
                media = tuple(zip(counts, self.keys(number, cache), strict=True))
                writer.keep(Features(cache.none(), media), rows.cpu())
        writer.close()


@dataclass(frozen=True)
class MicroBatches(Dataset):
    photos: Photos
    groups: list[list[int]]
    """Numbers of the samples of each."""
    padded: bool = False
    cache: FeatureCache | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, place: int) -> Batch:
        samples = [self.photos.sample(number, self.cache) for number in self.groups[place]]
        return micro_batch(self.photos.config, samples, self.padded)

    def loader(self) -> DataLoader:
        workers = min(8, os.cpu_count() - 1) if ON_GPU else 1
        return DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            pin_memory=ON_GPU,
            persistent_workers=True,
            multiprocessing_context="fork",
        )


class Way(NamedTuple):
    model: VisionLanguageModel
    loss: Callable[[VisionLanguageModel, Batch], Tensor]
    data: MicroBatches
    policy: str

    def epoch(self, loader: DataLoader, targets: int) -> None:
        """All micro-batches; what has no image has no gradient."""
        self.model.set_recompute(*self.policy.split("-"))
        for batch in loader:
            batch = batch.to(DEVICE, non_blocking=True)
            if len(batch.visual_rows):
                (self.loss(self.model, batch) / targets).backward()
            else:
                with torch.no_grad():
                    self.loss(self.model, batch)


def ways_of(photos: Photos, model: VisionLanguageModel, root: Path, share: int) -> dict[str, Way]:
    """The four of them."""
    twin, sizes = compiled_twin(model), photos.sizes
    cache = FeatureCache.of(root, model.visual)
    photos.fill(cache, model)
    with_image = [number for number, size in enumerate(sizes) if size[2]]
    places = packs([sizes[number] for number in with_image], TOKENS // share, PATCHES // share)
    groups = [[with_image[place] for place in pack] for pack in places]
    padded = MicroBatches(photos, list(pairs(len(sizes))), padded=True)
    packed, cached = MicroBatches(photos, groups), MicroBatches(photos, groups, cache=cache)
    largest = max(groups, key=lambda group: sum(area(sizes[n][2]) for n in group))
    batch = MicroBatches(photos, [largest])[0].to(DEVICE)

    def fastest(model: VisionLanguageModel) -> str:
        return set_fastest(model, lambda: ours(model, batch).backward())

    policy, compiled = fastest(model), fastest(twin)
    return {
        "naive": Way(model, naive, padded, "full-full"),
        "ours": Way(model, ours, packed, policy),
        "compiled": Way(twin, ours, packed, compiled),
        "cached": Way(twin, ours, cached, compiled),
    }


def measure(
    photos: Photos, model: VisionLanguageModel, root: Path, share: int, rounds: int
) -> tuple[dict[str, float], list[dict]]:
    """Differences of gradients from the naive one, and a row for each way where rounds are asked
    for."""
    gradients = Gradients(model)
    ways = ways_of(photos, model, root, share)
    gradients.take()
    loaders = {name: way.data.loader() for name, way in ways.items()}
    targets = sum(learnt for _, learnt, _ in photos.sizes)
    found = {}
    for name, way in ways.items():  # warm, too
        way.epoch(loaders[name], targets)
        found[name] = gradients.take()
    differences = {name: difference(found[name], found["naive"]) for name in ways}

    def timed(name: str) -> float:
        taken = seconds(lambda: ways[name].epoch(loaders[name], targets))
        gradients.take()
        return taken

    taken = interleaved(rounds, {name: lambda name=name: timed(name) for name in ways})
    seen = [size for size in photos.sizes if size[2]]
    useful = flops_of(photos.config, seen, TRAINS)
    unseen = sum(
        vision_flops(photos.config.vision, *grid, TRAINS)["vision tower"]
        for _, _, grids in seen
        for grid in grids
    )  # in the cached way
    rows = []
    for name, times in taken.items() if rounds else ():
        row = {"way": name, "micro-batches": len(ways[name].data), "policy": ways[name].policy}
        row |= {"samples/s": summary(len(photos.sizes) / value for value in times)}
        row |= speed(useful if name != "cached" else useful - unseen, times)
        rows.append(row | {"times naive": ratios(taken["naive"], times)})
    return differences, rows


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("gpu_stage1", __doc__).parse_args(argv)
    options.quick = options.quick or not ON_GPU
    config = tiny() if options.quick else hybrid_8b()
    share, rounds = (SMALLER, 1) if options.quick else (1, ROUNDS)
    sizes = recorded(config, "instruction", CHECKED // 2 if options.quick else SAMPLES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = Photos(config, sizes, folder)
        photos.write()
        few = Photos(shallow(config), sizes[:CHECKED], folder)
        model = random_model(few.config, TRAINS, torch.float32)
        gradient, _ = measure(few, model, folder / "features", share, rounds=0)
        print("gradient beside the naive one's, relative, float32:", gradient)
        model = random_model(config, TRAINS)
        rounded, rows = measure(photos, model, folder / "features", share, rounds)
    print_table(rows)
    write_result(
        "gpu_stage1",
        options,
        what=f"stage 1 of the 8B hybrid on one GPU, random weights, {len(sizes)} samples, JPEGs "
        f"decoded by workers; {CONVENTION}",
        target=TARGETS,
        figures={
            "gradient, relative difference from naive, two layers of each tower": gradient,
            "the same in bfloat16, all layers": rounded,
            "ways": rows,
            "compiler": compiler(),
            "peak TFLOP/s": peak(),
        },
        spread=f"least and most of {rounds} interleaved rounds",
        refuted_by="python -m bench.gpu_stage1 on an idle H100 or H200: a smaller ratio, or a "
        f"gradient that differs by more than {SAME} in float32",
        packages=("pillow",),
    )


if __name__ == "__main__":
    sys.exit(main())

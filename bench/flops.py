"""FLOPs of both stages against a loop with the recipe's flags, for the same gradient.

    python -m bench.flops

The loop is that of bench/naive.py. Of ours all products count that training executes: samples
packed, no product computed twice (policy `pointwise`), logits and the last layer's feed-forward at
target rows alone, and in stage 1 no sample of text alone. Every sample of both files of
bench/lengths is counted by formula, in pairs as a seeded epoch has them. Of a packed micro-batch of
each file, and of the loop over the same samples, torch counts too, on the full-size model on
the meta device. Attention counts every pair of a segment or of a padded sample, the masked ones
too, since that is what torch counts.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch

from bench.common import arguments, print_table, write_result
from bench.make_lengths import FOLDER, hybrid_8b
from bench.meta import count, on_meta
from bench.naive import (
    TRAINS,
    every_pair,
    frozen_tower_flops,
    merger_norm_flops,
    naive_count,
    naive_flops,
    transformers_model,
)
from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost import any_trains, text_flops, vision_flops
from vlm.cost.samples import Samples, micro_batch
from vlm.data.pack import Budget, arrange
from vlm.data.plan import epoch_order
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel

FILES = ("caption", "instruction")
TARGETS = {1: 1.8, 2: 1.6}
"""Times as many FLOPs in the naive loop, by stage."""
SEED = 42
RANKS = 8
PER_RANK = 16
"""Samples of a rank in the step that a micro-batch is taken of."""
COUNTED = 2
"""Samples of that micro-batch that torch counts; it takes many seconds for each."""


def recorded(name: str) -> Samples:
    """A file of bench/lengths in the order of a seeded epoch."""
    with np.load(FOLDER / f"{name}.npz") as file:
        columns = {key: file[key].astype(np.int64) for key in ("lengths", "targets", "grids")}
        owners = np.repeat(np.arange(len(file["lengths"])), file["images"])
    order = epoch_order((len(columns["lengths"]),), (1.0,), SEED, epoch=0)
    return take(Samples(**columns, owners=owners), order)


def take(samples: Samples, numbers: np.ndarray) -> Samples:
    """The samples of these numbers, in that order."""
    place = np.full(len(samples), len(numbers))
    place[numbers] = np.arange(len(numbers))
    owners = place[samples.owners]
    order = np.argsort(owners, kind="stable")
    order = order[owners[order] < len(numbers)]
    sizes = (samples.lengths[numbers], samples.targets[numbers])
    return Samples(*sizes, samples.grids[order], owners[order])


def our_flops(config: VLMConfig, samples: Samples, stage: int) -> dict[str, int]:
    """All that is executed, by tower."""
    if stage == 1:
        samples = take(samples, np.flatnonzero(samples.patches))
    text = text_flops(config.text, samples.lengths, samples.targets, TRAINS[stage])
    vision = vision_flops(config.vision, *samples.grids.T, TRAINS[stage])
    found = {name: int(flops.sum()) for name, flops in vision.items()}
    found["decoder"] = int(every_pair(text, samples.lengths).sum())
    if stage == 1:
        found["merger"] += merger_norm_flops(config.vision, samples)
    return found


def our_count(model: VisionLanguageModel, samples: Samples, stage: int) -> int:
    """What torch counts for `our_flops`, the samples in one micro-batch."""
    if stage == 1:
        samples = take(samples, np.flatnonzero(samples.patches))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any_trains(name, TRAINS[stage]))
    model.set_recompute("pointwise", "pointwise")
    batch = on_meta(micro_batch(model.config, samples))
    return count(lambda: cross_entropy_sum(model(batch), model.head_weight, batch.targets))


def one_micro_batch(config: VLMConfig, samples: Samples) -> Samples:
    """COUNTED samples of the first micro-batch of a step of RANKS ranks."""
    step = take(samples, np.arange(min(RANKS * PER_RANK, len(samples))))
    costs = every_pair(text_flops(config.text, step.lengths, step.targets, ()), step.lengths)
    micro = arrange(costs, step.lengths, step.patches, RANKS, Budget())[0][0]
    return take(step, np.array(micro[:COUNTED]))


def figures_of(config: VLMConfig, names: Sequence[str], most: int | None) -> tuple[list, list]:
    """A row for each file and stage: by formula, and counted by torch beside the formula."""
    with torch.device("meta"):
        ours = VisionLanguageModel(config)
    theirs = transformers_model(config)
    rows, checks = [], []
    for name in names:
        whole = take(recorded(name), np.arange(most)) if most else recorded(name)
        few = one_micro_batch(config, whole)
        for stage in TRAINS:
            own, naive = our_flops(config, whole, stage), naive_flops(config, whole, stage)
            row = {"data": name, "stage": stage, "samples": len(whole)}
            row |= {"ours, TFLOP": sum(own.values()) / 1e12, "naive, TFLOP": naive / 1e12}
            row["times fewer"] = round(naive / sum(own.values()), 3)
            if stage == 1:
                spared = naive - frozen_tower_flops(config.vision, whole)
                cached = sum(own.values()) - own["vision tower"]
                row["if naive spared the ViT"] = round(spared / sum(own.values()), 3)
                row["if ours cached it too"] = round(naive / cached, 3)
            rows.append(row)
            own, naive = our_count(ours, few, stage), naive_count(theirs, few, stage)
            by_formula = sum(our_flops(config, few, stage).values())
            check = {"data": name, "stage": stage, "samples": len(few), "counted": naive / own}
            check["ours, counted / formula"] = own / by_formula
            check["naive, counted / formula"] = naive / naive_flops(config, few, stage)
            checks.append(check)
    return rows, checks


def tiny() -> VLMConfig:
    """For --quick: the 8B hybrid's proportions at a sixteenth of its width."""
    vision = VisionConfig(2, 80, 4, 216, 256, (1,))
    text = TextConfig(4096, 256, 768, 2, 2, 1, 128, 1e6, mrope_section=(16, 24, 24))
    return VLMConfig(vision, text, 4000, 4001, 4002, 4003)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("flops", __doc__).parse_args(given)
    config, names, most = (tiny(), FILES[:1], 40) if options.quick else (hybrid_8b(), FILES, None)
    rows, checks = figures_of(config, names, most)
    print_table([{name: row.get(name, "") for name in rows[0]} for row in rows])
    print("of a few samples, counted by torch on the meta device:")
    print_table(checks)
    write_result(
        "flops",
        options,
        what="FLOPs of a transformers loop with the recipe's flags / ours, for the same samples of "
        "bench/lengths and the same gradient, 8B hybrid",
        target={f"stage {stage}": f">= {times}x fewer" for stage, times in TARGETS.items()},
        figures={"all samples": rows, "counted": checks},
        spread="none: a count is the same in every run",
        kind="derived",
        refuted_by="python -m bench.flops: torch counts another number than the formula for ours "
        "or for transformers' model",
        packages=("transformers",),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

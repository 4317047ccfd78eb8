"""Stage 2 on one GPU: micro-batches of the 8B hybrid and a whole AdamW step of the 4B one.

    python -m bench.gpu_stage2

Random weights in bfloat16; samples with the sizes of bench/lengths. A pack of text alone and one
with images, each within the recipe's budgets, run forward and backward in three ways that take
turns:

- naive: the same samples in pairs padded to the longer one, every block computed again in the
  backward pass, logits of all tokens in float32: the recipe's flags;
- ours: packed, logits of target rows, and the fastest recompute policy that fits;
- compiled: the same with compiled blocks.

All three use the same kernels of attention and the same vision tower, so that this is less than the
difference to a framework. Each gradient is let go as soon as it exists, as under ZeRO. The AdamW
step, naive or ours, is forward, backward, clipping and update with float32 gradients, masters and
moments. TFLOP/s count useful FLOPs only (`vlm.cost.CONVENTION`), for both ways the same ones.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from bench.common import arguments, interleaved, print_table, ratios, seconds, summary, write_result
from bench.gpu import (
    DEVICE,
    ON_GPU,
    PATCHES,
    SMALLER,
    TOKENS,
    Gradients,
    Sample,
    compiled_twin,
    compiler,
    difference,
    flops_of,
    hybrid_4b,
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
from vlm.batch import Batch
from vlm.config import VLMConfig
from vlm.cost import CONVENTION, PARTS
from vlm.gradients import drop_gradients
from vlm.model import VisionLanguageModel

ROUNDS = 5
TARGETS = {"text": ">= 60 % of the peak, useful", "mixed": ">= 55 % of the peak, useful"}
CLIP = 1.0
NAIVE_POLICY = "full-full"
SAME = 1e-4
"""Relative difference of two float32 gradients that are the same but for rounding."""


def pack_of(config: VLMConfig, kind: str, quick: bool) -> list[Sample]:
    """Samples of one micro-batch: text alone, or each with an image."""
    share = SMALLER if quick else 1
    mixed = kind == "mixed"
    sizes = recorded(config, "instruction", 400, lambda images: bool(images) == mixed)
    first = next(packs(sizes, TOKENS // share, PATCHES // share))
    return [make_sample(config, sizes[number], number) for number in first]


Step = Callable[[], None]


def steps_of(model: VisionLanguageModel, samples: Sequence[Sample]) -> tuple[Step, Step]:
    """The naive way and ours, over all samples once."""
    padded = [
        micro_batch(model.config, [samples[number] for number in pair], padded=True).to(DEVICE)
        for pair in pairs(len(samples))
    ]
    packed = micro_batch(model.config, samples).to(DEVICE)
    return (lambda: run(model, naive, padded)), (lambda: run(model, ours, [packed]))


def run(model: VisionLanguageModel, loss: Callable, batches: Sequence[Batch]) -> None:
    count = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        (loss(model, batch) / count).backward()


def same_gradient(
    config: VLMConfig, samples: Sequence[Sample], dtype: torch.dtype
) -> dict[str, float]:
    """Difference of each way's gradient from the naive one's, with two layers of each tower."""
    model = random_model(config, PARTS, dtype)
    twin, gradients = compiled_twin(model), Gradients(model)
    naive_step, our_step = steps_of(model, samples)
    model.set_recompute("full", "full")
    naive_step()
    expected, found = gradients.take(), {}
    model.set_recompute("pointwise", "pointwise")
    for name, step in (("ours", our_step), ("compiled", steps_of(twin, samples)[1])):
        step()
        found[name] = difference(gradients.take(), expected)
    return found


def micro_steps(config: VLMConfig, quick: bool, rounds: int) -> list[dict]:
    model = random_model(config, PARTS)
    drop_gradients(model)
    twin = compiled_twin(model)
    rows = []
    for kind in TARGETS:
        samples = pack_of(config, kind, quick)
        naive_step, our_step = steps_of(model, samples)
        compiled_step = steps_of(twin, samples)[1]
        ways = {
            "naive": Way(model, naive_step, NAIVE_POLICY),
            "ours": Way(model, our_step, set_fastest(model, our_step)),
            "compiled": Way(twin, compiled_step, set_fastest(twin, compiled_step)),
        }
        rows += timed(kind, samples, ways, rounds)
    return rows


class Way(NamedTuple):
    model: VisionLanguageModel
    step: Step
    policy: str
    """Of the ViT and of the language model, `full-full`."""

    def seconds(self) -> float:
        self.model.set_recompute(*self.policy.split("-"))
        return seconds(self.step)


def timed(kind: str, samples: Sequence[Sample], ways: Mapping[str, Way], rounds: int) -> list[dict]:
    """A row for each way of going through the samples, the naive one among them."""
    measures = {name: way.seconds for name, way in ways.items()}
    interleaved(1, measures)  # warm
    taken = interleaved(rounds, measures)
    sizes = [(len(sample.ids), sample.learnt, sample.grids) for sample in samples]
    useful = flops_of(ways["naive"].model.config, sizes, PARTS)
    rows = []
    for name, times in taken.items():
        row = {"pack": kind, "way": name, "samples": len(samples), "policy": ways[name].policy}
        row |= {"tokens": sum(len(sample.ids) for sample in samples), "seconds": summary(times)}
        rows.append(row | speed(useful, times) | {"times naive": ratios(taken["naive"], times)})
    return rows


class Trainer:
    """Float32 masters, and fused AdamW over them."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients = Gradients(model)
        self.parameters = dict(model.named_parameters())
        self.masters = {n: nn.Parameter(p.detach().float()) for n, p in self.parameters.items()}
        self.adamw = torch.optim.AdamW(self.masters.values(), lr=1e-5, fused=True)

    def update(self) -> None:
        for name, gradient in self.gradients.take().items():
            self.masters[name].grad = gradient
        nn.utils.clip_grad_norm_(self.masters.values(), CLIP, foreach=True)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))


def whole_steps(config: VLMConfig, quick: bool, rounds: int) -> list[dict]:
    """18 bytes a parameter: the 4B hybrid needs a device of 141 GB."""
    model = random_model(config, PARTS)
    trainer = Trainer(model)
    samples = pack_of(config, "mixed", quick)

    def with_update(step: Step) -> Step:
        return lambda: (step(), trainer.update())

    naive_step, our_step = map(with_update, steps_of(model, samples))
    ways = {
        "naive": Way(model, naive_step, NAIVE_POLICY),
        "ours": Way(model, our_step, set_fastest(model, our_step)),
    }
    return timed("mixed, AdamW step", samples, ways, rounds)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("gpu_stage2", __doc__).parse_args(argv)
    options.quick = options.quick or not ON_GPU
    rounds = 1 if options.quick else ROUNDS
    large, middle = (tiny(), tiny()) if options.quick else (hybrid_8b(), hybrid_4b())
    cut = shallow(large)
    samples = pack_of(cut, "mixed", options.quick)
    dtypes = (torch.float32,) if options.quick else (torch.float32, torch.bfloat16)
    gradient = {str(dtype): same_gradient(cut, samples, dtype) for dtype in dtypes}
    print("gradient beside the naive one's, relative:", gradient)
    rows = micro_steps(large, options.quick, rounds)
    print_table(rows)
    try:
        adamw = whole_steps(middle, options.quick, rounds)
        print_table(adamw)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        adamw = [{"pack": "mixed, AdamW step", "failed": str(error)}]
        print(f"the AdamW step does not fit: {error}")
    write_result(
        "gpu_stage2",
        options,
        what=f"stage 2 on one GPU, random weights, 8B micro-batches, a 4B step; {CONVENTION}",
        target=TARGETS,
        figures={
            "gradient, relative difference from naive": gradient,
            "micro-batches, 8B": rows,
            "AdamW step, 4B": adamw,
            "compiler": compiler(),
            "peak TFLOP/s": peak(),
        },
        spread=f"least and most of {rounds} interleaved rounds",
        refuted_by="python -m bench.gpu_stage2 on an idle H100 or H200: a smaller ratio, or a "
        f"gradient that differs by more than {SAME} in float32",
    )


if __name__ == "__main__":
    sys.exit(main())

"""What the three experiments on a GPU share: models of random weights, made on the device, and
micro-batches of recorded sizes.

They need torch, numpy and Pillow, and no network: neither a checkpoint nor a tokenizer. Without a
GPU they run with the smallest sizes and write nothing (`--quick`), so that they cannot rot.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import summary
from bench.make_lengths import FOLDER, hybrid_8b
from vlm.batch import Batch, Features, Segments
from vlm.compile import compile_blocks
from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost import any_trains, sample_flops
from vlm.cost.hardware import peak_tflops
from vlm.loss import cross_entropy
from vlm.model import VisionLanguageModel, initialise, packed_attention
from vlm.recompute import Policy
from vlm.rope import mrope_positions
from vlm.vision import plan_vision

Grid = tuple[int, int, int]
Size = tuple[int, int, tuple[Grid, ...]]
"""Tokens of a sample, how many of them are learnt (the last ones), and its images."""
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOKENS, PATCHES = 8192, 20480
"""The recipe's budgets of a micro-batch."""
SMALLER = 16
"""What sizes are divided by in a quick run."""
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """Legend: t tokens, P patches."""

    ids: Tensor
    """(t,) int64."""
    learnt: int
    """The last so many tokens are learnt."""
    grids: tuple[Grid, ...]
    patches: Tensor
    """(P, patch_dim) uint8."""
    features: Tensor | None = None
    """(P, D) in their stead: what the merger reads of its images, in window order."""


def hybrid_4b() -> VLMConfig:
    """Qwen2.5-VL-7B's tower under Qwen3-4B."""
    large = hybrid_8b()
    text = replace(large.text, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True)
    return replace(large, vision=replace(large.vision, out_hidden_size=2560), text=text)


def tiny() -> VLMConfig:
    vision = VisionConfig(2, 32, 2, 44, 64, (1,))
    text = TextConfig(512, 64, 128, 2, 4, 2, 16, 1e6, mrope_section=(2, 3, 3))
    return VLMConfig(vision, text, 509, 510, 507, 508)


def shallow(config: VLMConfig) -> VLMConfig:
    """Two layers of each tower, as wide as they are; one of the ViT's over whole frames."""
    vision = replace(config.vision, depth=2, fullatt_block_indexes=(1,))
    return replace(config, vision=vision, text=replace(config.text, num_hidden_layers=2))


def random_model(
    config: VLMConfig, trains: Sequence[str], dtype: torch.dtype = DTYPE
) -> VisionLanguageModel:
    """On the device, in whose memory nothing stays of the one before; `trains` has gradients."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    model.to(dtype).to_empty(device=DEVICE)
    initialise(model, torch.Generator(DEVICE).manual_seed(0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any_trains(name, trains))
    return model


def compiled_twin(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same parameters, their gradients too, in a model with compiled blocks."""
    with torch.device("meta"):
        twin = VisionLanguageModel(model.config)
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        setattr(twin.get_submodule(owner), own, parameter)
    compile_blocks(twin, compiler())
    return twin


@cache
def compiler() -> str:
    """What compiles blocks here: `inductor`; `eager`, which only traces them, on a CPU and where a
    GPU's machine lacks what inductor needs."""
    if not ON_GPU:
        return "eager"
    try:
        torch.compile(torch.exp)(torch.ones(2, device=DEVICE))
    except Exception as error:  # noqa: BLE001 - it may lack anything, Triton or a C compiler
        print(f"blocks are not compiled, since inductor fails here: {error}")
        return "eager"
    return "inductor"


# ---- samples and micro-batches


def recorded(
    config: VLMConfig, name: str, count: int, wanted: Callable[[int], bool] = lambda _images: True
) -> list[Size]:
    """The first `count` samples of a file of bench/lengths whose number of images is wanted;
    smaller ones where the model is tiny."""
    with np.load(FOLDER / f"{name}.npz") as file:
        lengths, targets, images = (file[key].tolist() for key in ("lengths", "targets", "images"))
        grids = file["grids"].tolist()
    found, first = [], 0
    for length, learnt, number in zip(lengths, targets, images, strict=True):
        own, first = grids[first : first + number], first + number
        if not wanted(number):
            continue
        if config.text.hidden_size < hybrid_4b().text.hidden_size:
            own = [(1, 4, 2 * (1 + h // 40)) for _, h, _ in own]
            length = 4 + length // SMALLER + sum(h * w // 4 for _, h, w in own)
            learnt = 1 + learnt // SMALLER // 2
        found.append((length, learnt, tuple(map(tuple, own))))
        if len(found) == count:
            break
    return found


def area(grids: Sequence[Grid]) -> int:
    """Patches."""
    return sum(t * h * w for t, h, w in grids)


def packs(sizes: Sequence[Size], tokens: int, patches: int) -> Iterator[list[int]]:
    """Numbers of the samples of each micro-batch: in order, all that still fit into it."""
    left = list(range(len(sizes)))
    while left:
        taken, room, free = [], tokens, patches
        for number in left:
            length, _, grids = sizes[number]
            fits = length <= room and area(grids) <= free
            if fits or not taken:
                taken.append(number)
                room, free = room - length, free - area(grids)
        left = [number for number in left if number not in taken]
        yield taken


def make_sample(
    config: VLMConfig,
    size: Size,
    seed: int,
    patches: Tensor | None = None,
    features: Tensor | None = None,
) -> Sample:
    """Images first, random ones where none are given, then random words."""
    generator = torch.Generator().manual_seed(seed)
    length, learnt, grids = size
    words = config.vision_start_token_id  # the media's tokens lie above all words
    ids = torch.randint(0, words, (length,), generator=generator)
    ids[: area(grids) // config.vision.merge_unit] = config.image_token_id
    if patches is None:
        shape = (0 if features is not None else area(grids), config.vision.patch_dim)
        patches = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Sample(ids, learnt, grids, patches, features)


def micro_batch(config: VLMConfig, samples: Sequence[Sample], padded: bool = False) -> Batch:
    """Samples one after the other; or each padded to the longest, as a batch with an axis has it:
    its padding is computed, and lies behind what could see it."""
    lengths = [len(sample.ids) for sample in samples]
    places = [max(lengths)] * len(samples) if padded else lengths
    ids, positions, rows, targets, first = [], [], [], [], 0
    for sample, length, place in zip(samples, lengths, places, strict=True):
        own = mrope_positions(sample.ids, sample.grids, config)
        ids.append(F.pad(sample.ids, (0, place - length)))
        positions.append(F.pad(own, (0, place - length)))
        rows.append(torch.arange(length - 1 - sample.learnt, length - 1) + first)
        targets.append(sample.ids[length - sample.learnt :])
        first += place
    grids = [grid for sample in samples for grid in sample.grids]
    patches = torch.cat([sample.patches for sample in samples])
    features = None
    if any(sample.features is not None for sample in samples):
        kept = torch.cat([s.features for s in samples if s.features is not None])
        features = Features(kept, tuple((area([grid]), None) for grid in grids))
    elif not grids:  # text alone carries a blank dummy
        side = config.vision.spatial_merge_size
        grids = [(1, side, side)]
        patches = torch.zeros(side**2, config.vision.patch_dim, dtype=torch.uint8)
    joined = torch.cat(ids)
    return Batch(
        input_ids=joined,
        position_ids=torch.cat(positions, dim=1),
        segments=Segments.of(places),
        target_rows=torch.cat(rows),
        targets=torch.cat(targets),
        weights=None,
        visual_rows=(joined == config.image_token_id).nonzero().flatten(),
        patches=patches,
        vision=plan_vision(grids, config.vision),
        ids=(),
        features=features,
    )


# ---- one micro-batch, forward and backward


def ours(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """The loss of target rows, summed."""
    return cross_entropy(model(batch), model.head_weight, batch.targets).sum


def naive(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """The same sum by logits of every token in float32, as transformers' loss has it."""
    rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    hidden = model.decode(batch, packed_attention(batch.segments), rows)
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[batch.target_rows] = batch.targets
    logits = F.linear(hidden, model.head_weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


class Gradients:
    """Gradients of all micro-batches of a step added up in float32, as both engines do."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._collector(name))

    def _collector(self, name: str) -> Callable[[nn.Parameter], None]:
        def collect(parameter: nn.Parameter) -> None:
            if name in self.sums:
                self.sums[name] += parameter.grad
            else:
                self.sums[name] = parameter.grad.float()
            parameter.grad = None

        return collect

    def take(self) -> dict[str, Tensor]:
        """The sums, which start again."""
        taken, self.sums = self.sums, {}
        return taken


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of two gradients, relative to the second's norm."""
    assert found.keys() == expected.keys()
    squares = [(found[name] - expected[name]).square().sum() for name in expected]
    whole = [value.square().sum() for value in expected.values()]
    return float((torch.stack(squares).sum() / torch.stack(whole).sum()).sqrt())


POLICIES: tuple[tuple[Policy, Policy], ...] = (
    ("none", "none"), ("pointwise", "pointwise"), ("full", "pointwise"), ("full", "full"),
)  # fmt: skip
"""Of the ViT and of the language model, the fastest first."""


def set_fastest(model: VisionLanguageModel, step: Callable[[], object]) -> str:
    """The first of `POLICIES` under which a step fits into the device's memory."""
    for policies in POLICIES:
        model.set_recompute(*policies)
        try:
            step()
            return "-".join(policies)
        except torch.cuda.OutOfMemoryError:
            pass  # the traceback holds activations until the handler has been left
        torch.cuda.empty_cache()
    raise MemoryError("a step does not fit into the device, even if all is computed again")


def flops_of(config: VLMConfig, sizes: Sequence[Size], trains: Sequence[str]) -> float:
    """Useful FLOPs of a step (`vlm.cost.CONVENTION`)."""
    return sum(
        sample_flops(config, length, grids, learnt, trains) for length, learnt, grids in sizes
    )


def peak() -> float | None:
    """TFLOP/s of the device in bfloat16; None where it is not known."""
    return peak_tflops(torch.cuda.get_device_name(), "bfloat16") if ON_GPU else None


def speed(flops: float, times: Sequence[float]) -> dict[str, dict | float | None]:
    """TFLOP/s, and their median's share of the device's peak."""
    found, bound = summary(flops / 1e12 / value for value in times), peak()
    return {"TFLOP/s": found, "% of peak": bound and round(100 * found["median"] / bound, 1)}


def pairs(count: int) -> Iterator[list[int]]:
    """Numbers of the samples of the recipe's micro-batches."""
    return ([*range(count)][first : first + 2] for first in range(0, count, 2))

"""The proof of packing, on a user's own data and model: part of `python -m vlm.data.check`.

The same samples go through the model packed into few micro-batches and one by one. The loss and
each tower's gradient must agree, and a sample must not see its neighbours: when one is changed,
vision features and hidden states of the others stay. Weights, activations and gradients are
float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vlm.checkpoint import load_model
from vlm.cost import PARTS, part_of, sample_flops
from vlm.data.collate import collate
from vlm.data.ledger import Entry
from vlm.data.pack import Budget, arrange
from vlm.data.processor import IGNORED, Example, Processor
from vlm.data.schema import BadSample
from vlm.data.sources import DataError, Source
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel, packed_attention

TOLERANCE = 1e-4
"""Of relative differences. The order of float32 sums alone makes about 1e-6 of it; a sample that
sees another one, 1e-2 and more."""


@dataclass(frozen=True)
class Row:
    """One quantity, packed against one by one."""

    name: str
    difference: float
    """|packed - alone| / |alone|, by Euclidean norms; inf where only one of them is zero."""
    alone: float
    """The value, or the norm of it."""
    packed: float
    cosine: float | None = None
    """Between the two gradients; None where both are zero, or nothing has a direction."""

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE  # a nan does not


@dataclass(frozen=True)
class Proof:
    samples: int
    tokens: int
    micro_batches: int
    rows: tuple[Row, ...]
    bad: tuple[Entry, ...]
    """Samples that were left out."""

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows)

    def as_json(self) -> dict:
        rows = [asdict(row) | {"holds": row.holds} for row in self.rows]
        for row in rows:  # JSON has no inf and no nan
            row |= {k: str(v) for k, v in row.items() if isinstance(v, float) and not isfinite(v)}
        return {"holds": self.holds, "samples": self.samples, "rows": rows}

    def table(self) -> str:
        width = max(len(row.name) for row in self.rows)
        names = "one by one", "packed", "difference", "cosine"
        lines = [
            f"packing {self.samples} samples ({self.tokens:,} tokens) into {self.micro_batches} "
            f"micro-batches, against one by one; {len(self.bad)} bad samples left out",
            " " * width + "".join(f"{name:>14}" for name in names),
        ]
        for row in self.rows:
            cosine = "-" if row.cosine is None else f"{row.cosine:.8f}"
            numbers = f"{row.alone:14.6g}{row.packed:14.6g}{row.difference:14.1e}{cosine:>14}"
            lines.append(f"{row.name:{width}}{numbers}{'' if row.holds else '  FAILS'}")
        failed = ", ".join(row.name for row in self.rows if not row.holds)
        verdict = f"packing does not hold: {failed}" if failed else "packing holds"
        return "\n".join([*lines, f"{verdict} (relative differences up to {TOLERANCE:g} allowed)"])


def prove(
    sources: tuple[Source, ...], processor: Processor, model_dir: Path | str, count: int
) -> Proof:
    """The proof on the first `count` good samples, taken from the sources in turn.

    On the GPU where there is one. Memory: weights and gradients in float32 there, and one more
    copy of the gradients in the host's.

    Raises:
        DataError: fewer than two good samples; CheckpointError as `load_model` does.
    """
    examples, bad = take_examples(sources, processor, count)
    if len(examples) < 2:
        first = f"; the first bad one: {bad[0].id}: {bad[0].reason}" if bad else ""
        raise DataError(f"{len(examples)} good samples; packing takes two or more{first}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_dir, torch.float32, device)
    packs = pack(examples, processor)
    rows = [*compare(model, packs), *isolate(model, packs)]
    tokens = sum(example.length for example in examples)
    return Proof(len(examples), tokens, len(packs), tuple(rows), tuple(bad))


def take_examples(
    sources: tuple[Source, ...], processor: Processor, count: int
) -> tuple[list[Example], list[Entry]]:
    """The first good samples of the sources in turn, and the bad ones that were met."""
    examples, bad = [], []
    waiting = [_examples(source, processor) for source in sources]
    while waiting and len(examples) < count:
        reader = waiting.pop(0)
        for found in reader:
            (examples if isinstance(found, Example) else bad).append(found)
            if isinstance(found, Example):
                waiting.append(reader)
                break
    return examples, bad


def _examples(source: Source, processor: Processor) -> Iterator[Example | Entry]:
    for chunk in source.chunks():
        for row, place in zip(chunk.rows, chunk.places, strict=True):
            try:
                yield processor.encode(source.parse(row, place))
            except BadSample as error:
                yield Entry(error.sample_id, error.reason, "decoding")


def pack(examples: Sequence[Example], processor: Processor) -> list[list[Example]]:
    """The samples in as few micro-batches as training's budgets allow, two or more in some."""
    lengths = np.array([example.length for example in examples], np.int64)
    patches = np.array([len(example.patches) for example in examples], np.int64)
    costs = [
        sample_flops(processor.config, e.length, e.grid_thw, learnt_in([e]), PARTS)
        for e in examples
    ]
    budget = Budget(
        tokens=max(Budget.tokens, int(np.sort(lengths)[-2:].sum())),
        patches=max(Budget.patches, int(np.sort(patches)[-2:].sum())),
    )
    (micro_batches,) = arrange(np.array(costs), lengths, patches, 1, budget)
    return [[examples[place] for place in micro] for micro in micro_batches]


def learnt_in(examples: Sequence[Example]) -> int:
    """Targets."""
    return sum(int((example.targets != IGNORED).sum()) for example in examples)


def compare(model: VisionLanguageModel, packs: list[list[Example]]) -> list[Row]:
    """Loss and gradients: one row for the loss, and one for each tower's gradient."""
    singles = [[example] for examples in packs for example in examples]
    loss_alone = _learn(model, singles, "one by one")
    alone = {name: None if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()}
    loss = _learn(model, packs, "packed")
    sums = {part: [0.0] * 4 for part in PARTS}  # |a|^2, |p|^2, |p - a|^2, a . p
    for name, parameter in model.named_parameters():
        if alone[name] is None and parameter.grad is None:
            continue
        one = torch.zeros_like(parameter, device="cpu") if alone[name] is None else alone[name]
        other = torch.zeros_like(one) if parameter.grad is None else parameter.grad.cpu()
        pairs = ((one, one), (other, other), (other - one,) * 2, (one, other))
        part = part_of(name)
        terms = (_dot(left, right) for left, right in pairs)
        sums[part] = [held + term for held, term in zip(sums[part], terms, strict=True)]
    model.zero_grad(set_to_none=True)
    rows = [Row("loss", _relative(abs(loss - loss_alone), abs(loss_alone)), loss_alone, loss)]
    for part, (one, other, apart, product) in sums.items():
        one, other, apart = one**0.5, other**0.5, apart**0.5
        cosine = product / (one * other) if one * other else None
        rows.append(Row(f"gradient of {part}", _relative(apart, one), one, other, cosine))
    return rows


def _learn(model: VisionLanguageModel, packs: list[list[Example]], name: str) -> float:
    """Accumulate the gradients of all; returns the loss per target."""
    model.zero_grad(set_to_none=True)
    device = model.head_weight.device
    learnt = sum(learnt_in(examples) for examples in packs)
    total = 0.0
    for examples in tqdm(packs, desc=name, unit=" micro-batches", disable=None):
        batch = collate(examples, model.config).to(device)
        hidden = model(batch)
        loss = cross_entropy_sum(hidden, model.head_weight, batch.targets, batch.weights) / learnt
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def isolate(model: VisionLanguageModel, packs: list[list[Example]]) -> list[Row]:
    """Whether the others stay when the first, and when the last sample of a pack is changed.

    One row for the vision features of the others, and one for their hidden states.
    """
    features, hidden = np.zeros(3), np.zeros(3)
    for examples in packs:
        if len(examples) < 2:
            continue
        before = _seen(model, examples)
        for place in (0, len(examples) - 1):
            changed = [*examples]
            changed[place] = _other(examples[place], model)
            after = _seen(model, changed)
            for sums, old, new in zip((features, hidden), before, after, strict=True):
                for other in range(len(examples)):
                    if other != place:
                        one, two = old[other].double(), new[other].double()
                        sums += [_dot(one, one), _dot(two, two), _dot(two - one, two - one)]
    names = tuple(
        f"{what} beside a changed sample" for what in ("vision features", "hidden states")
    )
    roots = [np.sqrt(sums).tolist() for sums in (features, hidden)]
    return [
        Row(name, _relative(apart, one), one, two)
        for name, (one, two, apart) in zip(names, roots, strict=True)
    ]


def _seen(model: VisionLanguageModel, examples: list[Example]) -> tuple[list[Tensor], ...]:
    """Vision features and hidden states of each sample of a pack."""
    batch = collate(examples, model.config).to(model.head_weight.device)
    unit = model.config.vision.merge_unit
    tokens = [len(example.patches) // unit for example in examples]
    features = model.visual(batch.patches, batch.vision)[: sum(tokens)]  # without a dummy's
    rows = torch.arange(len(batch.input_ids), device=features.device)
    hidden = model.decode(batch, packed_attention(batch.segments), rows)
    return features.split(tokens), hidden.split([example.length for example in examples])


def _other(example: Example, model: VisionLanguageModel) -> Example:
    """A sample of the same shape with another text and other pixels."""
    config = model.config
    media = torch.tensor([config.image_token_id, config.video_token_id])
    is_media = torch.isin(example.input_ids, media)
    ids = torch.where(is_media, example.input_ids, example.input_ids.roll(1))
    ids = torch.where(is_media | ~torch.isin(ids, media), ids, 0)
    return replace(example, input_ids=ids, patches=255 - example.patches)


def _dot(left: Tensor, right: Tensor) -> float:
    return (left.double() * right.double()).sum().item()


def _relative(apart: float, size: float) -> float:
    if apart == 0:
        return 0.0
    return apart / size if size else float("inf")

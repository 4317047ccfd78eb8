"""Part of the proof: the hybrid's settings and tensors against a donor's, bit for bit."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vlm.checkpoint import TensorReader, check_names
from vlm.config import TextConfig, VLMConfig
from vlm.graft.plan import EMBEDDING, HEAD, QKV_BIASES
from vlm.tensor_file import DTYPES

BLOCK = 16 * 2**20
"""Values that are compared at a time."""
GLANCE = 2**14
"""Values that tell two layers' tensors apart, nearly always."""
DECODER = "model.language_model."
NUMBERED = re.compile(r"(?P<before>.*\.(?:layers|blocks)\.)(?P<layer>\d+)(?P<after>\..*)")


@dataclass(frozen=True)
class Difference:
    """Something of the hybrid that is not the donor's."""

    name: str
    """The tensor's, or `config.json` or `tokenizer.json`."""
    how: str
    held: str = ""
    """The donor's tensor that the hybrid holds in its place, if it is one."""


class DonorTensors:
    """A donor's tensors in the dtypes that the hybrid holds them in, as `build --dtype` rounds."""

    def __init__(self, donor: TensorReader, hybrid: TensorReader) -> None:
        self._donor, self.names, self.shape = donor, donor.names, donor.shape
        self.dtype = donor.dtype  # its own
        held = set(hybrid.names())
        self.dtypes = {
            name: (hybrid if name in held else donor).dtype(name) for name in donor.names()
        }

    def conversions(self, names: Iterable[str]) -> dict[tuple[str, str], int]:
        """(donor's dtype, hybrid's) -> how many of these tensors are read as another dtype."""
        pairs = [(self.dtype(name), self.dtypes[name]) for name in names]
        return Counter(pair for pair in pairs if pair[0] != pair[1])

    def get(self, name: str) -> Tensor:
        return self._donor.get(name).to(DTYPES[self.dtypes[name]])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._donor.rows(name, start, stop).to(DTYPES[self.dtypes[name]])


def open_checked(
    folder: Path, kind: type[nn.Module], config: VLMConfig | TextConfig, tied: bool
) -> TensorReader:
    """A checkpoint that has just the tensors of `kind(config)`; raises as `check_names`."""
    reader = TensorReader(folder)
    if tied:  # some tools write the tied head out
        reader.discard(HEAD)
    with torch.device("meta"):
        model = kind(config)
    check_names({name: tuple(x.shape) for name, x in model.state_dict().items()}, reader)
    return reader


def compare_settings(ours: object, theirs: object, names: Sequence[str]) -> list[Difference]:
    """Differences of two configs in these attributes."""
    values = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    return [
        Difference("config.json", f"{name} is {mine}, the donor's is {donors}")
        for name, mine, donors in values
        if mine != donors
    ]


def head_name(config: TextConfig) -> str:
    """The tensor that makes logits."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def text_pairs(
    config: TextConfig, hybrid: TensorReader, donor_config: TextConfig, donor: DonorTensors
) -> list[tuple[str, str]]:
    """(hybrid's, donor's) names of the tensors that both have; heads by what they do."""
    shared = sorted(set(hybrid.names()) & set(donor.names()) - {HEAD})
    heads = head_name(config), head_name(donor_config)
    return [(name, name) for name in shared] + ([heads] if heads != (EMBEDDING,) * 2 else [])


def nonzero_biases(hybrid: TensorReader) -> list[Difference]:
    """Biases of queries, keys and values, which Qwen3 has not: harmless only where zero."""
    names = [n for n in hybrid.names() if n.endswith(QKV_BIASES) and n.startswith(DECODER)]
    how = "is not zero, and the donor has no such bias"
    return [Difference(name, how) for name in names if hybrid.get(name).any()]


def lost(ours: TextConfig, theirs: TextConfig) -> list[str]:
    """In words, what of the language donor the hybrid does without."""
    said = []
    if theirs.qk_norm and not ours.qk_norm:
        said.append(
            f"QK-norm of all {ours.num_hidden_layers} layers (the literal variant drops q_norm and "
            "k_norm): queries and keys are neither normalised nor scaled as they were trained to be"
        )
    layers = ours.num_hidden_layers, theirs.num_hidden_layers
    if layers[0] < layers[1]:
        said.append(
            f"the hybrid has {layers[0]} of the donor's {layers[1]} layers: the final norm and the "
            "head read an earlier layer than they were trained on"
        )
    return said


def dtype_notes(donor: DonorTensors, which: str, names: Sequence[str]) -> list[str]:
    """Which of a donor's tensors were not compared as they are."""
    return [
        f"{count} tensors are {ours} in the hybrid and {theirs} in the {which} donor, whose values "
        f"were converted to {ours} before anything was compared"
        for (theirs, ours), count in donor.conversions(names).items()
    ]


def rounded(donor: DonorTensors, names: Sequence[str]) -> str:
    """The dtype that a donor's values were rounded to, empty where they are as they were."""
    return ", ".join(sorted({ours for _, ours in donor.conversions(names)} - {"F32"}))


def compare_dtypes(
    pairs: Sequence[tuple[str, str]], hybrid: TensorReader, donor: DonorTensors, asked: str | None
) -> list[Difference]:
    """Tensors in a dtype that no build gives them: all in `--dtype`, or each as its donor has it.

    Args: asked: what the report says of `--dtype`; without one, one dtype for all will do.
    """
    if asked is None and len({hybrid.dtype(name) for name in hybrid.names()}) == 1:
        return []
    found = []
    for name, theirs in pairs:
        held, expected = hybrid.dtype(name), asked or donor.dtype(theirs)
        if held != expected:
            whose = "--dtype of the build was" if asked else "the donor's is"
            found.append(Difference(name, f"is {held}, and {whose} {expected}"))
    return found


def compare_tensors(
    pairs: Iterable[tuple[str, str]], hybrid: TensorReader, donor: DonorTensors
) -> list[Difference]:
    """Differences of (hybrid's, donor's) tensors; rows that only the hybrid has do not count."""
    found = []
    with tqdm(list(pairs), desc="compare", unit=" tensors", disable=None) as bar:
        for name, theirs in bar:
            ours, expected = hybrid.shape(name), donor.shape(theirs)
            grown = name in (EMBEDDING, HEAD) and ours[0] > expected[0]
            if ours[1:] != expected[1:] or (ours[0] != expected[0] and not grown):
                how = f"has shape {list(ours)}, the donor's {list(expected)}"
                found.append(Difference(name, how))
                continue
            rows = differing_rows(hybrid, name, donor, theirs)
            if len(rows):
                held = _which_layer(hybrid, name, donor)
                what = "values" if len(expected) == 1 else "rows"
                how = f"{len(rows)} of {expected[0]} {what} differ, the first is {rows[0]}"
                how += "" if name == theirs else f" (against the donor's {theirs})"
                found.append(Difference(name, how, held))
    return found


def differing_rows(
    hybrid: TensorReader,
    name: str,
    donor: DonorTensors,
    theirs: str,
    stop: int | None = None,
) -> Tensor:
    """Indices of the donor's rows (up to `stop`) whose bits the hybrid has not; (n,) int64."""
    count = donor.shape(theirs)[0] if stop is None else stop
    step = max(1, BLOCK // width(donor.shape(theirs)))
    differing = []
    for start in range(0, count, step):
        block = start, min(start + step, count)
        values = hybrid.rows(name, *block)
        ours, expected = bits(values), bits(donor.rows(theirs, *block).to(values.dtype))
        if not torch.equal(ours, expected):
            differing.append((ours != expected).any(dim=1).nonzero().flatten() + start)
    return torch.cat(differing) if differing else torch.zeros(0, dtype=torch.int64)


def bits(rows: Tensor) -> Tensor:
    """(n, width) integers that are equal where all bits are: nan is itself, -0 is not 0."""
    kind = {2: torch.int16, 4: torch.int32}[rows.element_size()]
    return rows.reshape(len(rows), -1).view(kind)


def width(shape: tuple[int, ...]) -> int:
    return max(1, torch.Size(shape[1:]).numel())


def _which_layer(hybrid: TensorReader, name: str, donor: DonorTensors) -> str:
    """The donor's tensor of another layer that the hybrid holds under `name`; empty if none."""
    place = NUMBERED.fullmatch(name)
    if place is None:
        return ""
    shape = donor.shape(name)
    glance = min(shape[0], max(1, GLANCE // width(shape)))
    for other in donor.names():
        match = NUMBERED.fullmatch(other)
        if (
            match
            and other != name
            and (match["before"], match["after"]) == (place["before"], place["after"])
            and donor.shape(other) == shape
            and not len(differing_rows(hybrid, name, donor, other, glance))
            and not len(differing_rows(hybrid, name, donor, other))
        ):
            return other
    return ""


def describe_differences(differences: list[Difference]) -> list[str]:
    """A line each; the tensors that two layers have exchanged are one."""
    lines, moved = [], {}
    for difference in differences:
        if difference.held:
            place, held = (NUMBERED.fullmatch(x) for x in (difference.name, difference.held))
            key = f"{place['before']}{place['layer']}", held["layer"]
            moved.setdefault(key, []).append(place["after"][1:])
        else:
            lines.append(f"{difference.name}: {difference.how}")
    return [
        f"{place} holds the donor's layer {layer}: {', '.join(parts)}"
        for (place, layer), parts in moved.items()
    ] + lines

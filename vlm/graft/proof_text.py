"""Part of the proof: three decoders on the same texts, one layer at a time.

The hybrid's through M-RoPE, ours on the donor with plain rope, and transformers' Qwen3. A layer's
tensors are read, used and let go, and the head goes by blocks of the vocabulary: memory holds one
layer in float32 whatever the model's size.

Legend: T tokens, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vlm.batch import Batch, Segments
from vlm.checkpoint import TensorReader
from vlm.config import TextConfig, VLMConfig
from vlm.graft.plan import EMBEDDING
from vlm.graft.proof_tensors import DonorTensors, head_name
from vlm.layers import RMSNorm
from vlm.model import packed_attention
from vlm.rope import mrope_positions
from vlm.text import TextDecoder
from vlm.vision import plan_vision

HEAD_ROWS = 8192
LAYER = "model.language_model.layers.{}."
NORM = "model.language_model.norm.weight"
TINY = torch.finfo(torch.float32).tiny
Tensors = TensorReader | DonorTensors


@dataclass(frozen=True)
class Stage:
    """How far the streams are apart after one step of the forward pass."""

    name: str
    max_abs_delta: float
    """Of the hybrid against ours on the donor."""
    witness_max_abs_delta: float
    """Against transformers, as a share of its largest |value|."""

    @classmethod
    def of(cls, name: str, hybrid: Tensor, donor: Tensor, witness: Tensor) -> "Stage":
        share = largest(hybrid - witness) / max(largest(witness), TINY)
        return cls(name, largest(hybrid - donor), share)


@dataclass(frozen=True)
class TextFigures:
    """What was measured on texts. Of a grown vocabulary the donor's tokens alone count."""

    tokens: int
    max_abs_delta: float
    """Of the logits, against our decoder on the donor with plain rope."""
    witness_max_abs_delta: float
    """Of the logits, against transformers' Qwen3, as a share of its largest |logit|."""
    top1_agreement: float
    """Share of tokens with the same most likely next token as our decoder on the donor."""
    witness_top1_agreement: float
    perplexity: float
    """Of the hybrid on the texts; nan where no text has two tokens."""
    donor_perplexity: float
    stages: list[Stage]


def text_batch(texts: list[Tensor], config: VLMConfig) -> Batch:
    """Texts packed, with every row asked for, and the dummy image that text alone carries."""
    ids = torch.cat(texts)
    merge = config.vision.spatial_merge_size
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([mrope_positions(text, [], config) for text in texts], dim=1),
        segments=Segments.of([len(text) for text in texts]),
        target_rows=torch.arange(len(ids)),
        targets=torch.cat([F.pad(text[1:], (0, 1), value=-1) for text in texts]),
        weights=None,
        visual_rows=torch.zeros(0, dtype=torch.int64),
        patches=torch.zeros(merge**2, config.vision.patch_dim, dtype=torch.uint8),
        vision=plan_vision([(1, merge, merge)], config.vision),
        ids=(),
    )


class Stream:
    """The hidden states of one decoder of ours."""

    def __init__(
        self, tensors: Tensors, config: TextConfig, batch: Batch, positions: Tensor
    ) -> None:
        self.config, self.positions = config, positions
        self.attend = packed_attention(batch.segments)
        ids, where = batch.input_ids.unique(return_inverse=True)
        rows = [tensors.rows(EMBEDDING, index, index + 1) for index in ids.tolist()]
        self.x = torch.cat(rows).float()[where]

    def advance(self, tensors: dict[str, Tensor]) -> None:
        """Through the layer that has these tensors."""
        with torch.device("meta"):
            decoder = TextDecoder(replace(self.config, num_hidden_layers=1))
        decoder.layers[0].load_state_dict(tensors, assign=True)
        self.x = decoder(self.x, self.positions, self.attend)

    def finish(self, weight: Tensor) -> None:
        """Through the final norm."""
        norm = RMSNorm(len(weight), self.config.rms_norm_eps)
        norm.load_state_dict({"weight": weight}, assign=True)
        self.x = norm(self.x)


def compare_texts(
    texts: list[Tensor],
    config: VLMConfig,
    hybrid: TensorReader,
    donor_config: TextConfig,
    donor: DonorTensors,
    donor_raw: dict,
) -> TextFigures:
    """Run the three decoders side by side.

    A hybrid of fewer layers than its donor is compared layer by layer as far as it goes, and
    its logits with those of the whole donor.

    Args:
        texts: token ids of each, (t,) int64.
        donor_raw: the donor's `config.json`, which the witness reads by itself.
    """
    from vlm.graft.proof_witness import TextWitness  # transformers: not for `build`

    batch = text_batch(texts, config)
    plain = torch.cat([torch.arange(len(text)) for text in texts]).expand(3, -1)
    ours = Stream(hybrid, config.text, batch, batch.position_ids)
    theirs = Stream(donor, donor_config, batch, plain)
    witness = TextWitness(donor_raw, theirs.x, batch.segments.lengths)
    stages = [Stage.of("embed_tokens", ours.x, theirs.x, witness.x)]
    depths = config.text.num_hidden_layers, donor_config.num_hidden_layers
    for index in tqdm(range(max(depths)), desc="text", unit=" layers", disable=None):
        if index < depths[0]:
            ours.advance(part(hybrid, LAYER.format(index)))
        if index < depths[1]:
            tensors = part(donor, LAYER.format(index))
            theirs.advance(tensors)
            witness.advance(tensors)
            del tensors  # before the next layer is read
        if index < min(depths):
            stages.append(Stage.of(f"layers.{index}", ours.x, theirs.x, witness.x))
    ours.finish(hybrid.get(NORM).float())
    weight = donor.get(NORM).float()
    theirs.finish(weight)
    witness.finish(weight)
    stages.append(Stage.of("norm", ours.x, theirs.x, witness.x))
    heads = (
        lambda start, stop: hybrid.rows(head_name(config.text), start, stop),
        lambda start, stop: donor.rows(head_name(donor_config), start, stop),
    )
    states = ours.x, theirs.x, witness.x
    return _compare_logits(states, heads, donor_config.vocab_size, batch.targets, stages)


def part(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors below a name, by the rest of their names, in float32."""
    names = [name for name in tensors.names() if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.get(name).float() for name in names}


Head = Callable[[int, int], Tensor]


def _compare_logits(
    states: tuple[Tensor, Tensor, Tensor],
    heads: tuple[Head, Head],
    vocab_size: int,
    targets: Tensor,
    stages: list[Stage],
) -> TextFigures:
    """Figures of the logits of hybrid, donor and witness, by blocks of the vocabulary."""
    ours, theirs, witness = tallies = [Tally(targets) for _ in states]
    delta = witness_delta = witness_largest = 0.0
    for start in range(0, vocab_size, HEAD_ROWS):
        block = start, min(start + HEAD_ROWS, vocab_size)
        logits = [F.linear(states[0], heads[0](*block).float())]
        weight = heads[1](*block).float()
        logits += [F.linear(state, weight) for state in states[1:]]
        for tally, values in zip(tallies, logits, strict=True):
            tally.add(start, values)
        delta = max(delta, largest(logits[0] - logits[1]))
        witness_delta = max(witness_delta, largest(logits[0] - logits[2]))
        witness_largest = max(witness_largest, largest(logits[2]))
    return TextFigures(
        tokens=len(targets),
        max_abs_delta=delta,
        witness_max_abs_delta=witness_delta / max(witness_largest, TINY),
        top1_agreement=ours.agreement(theirs),
        witness_top1_agreement=ours.agreement(witness),
        perplexity=ours.perplexity(),
        donor_perplexity=theirs.perplexity(),
        stages=stages,
    )


class Tally:
    """Most likely token and log-probability of the target, over a vocabulary seen in blocks."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.top = torch.full(targets.shape, float("-inf"))
        self.token = torch.full_like(targets, -1)
        self.log_total = self.top.clone()
        self.target_logit = torch.zeros(targets.shape)

    def add(self, start: int, logits: Tensor) -> None:
        """Logits (T, n) of tokens start to start + n."""
        top, token = logits.max(dim=-1)
        better = top > self.top
        self.top = torch.where(better, top, self.top)
        self.token = torch.where(better, token + start, self.token)
        self.log_total = torch.logaddexp(self.log_total, logits.logsumexp(dim=-1))
        inside = (self.targets >= start) & (self.targets < start + logits.shape[1])
        self.target_logit[inside] = logits[inside, self.targets[inside] - start]

    def agreement(self, other: "Tally") -> float:
        return (self.token == other.token).float().mean().item()

    def perplexity(self) -> float:
        """Over the tokens that have a next one."""
        losses = (self.log_total - self.target_logit)[self.targets >= 0]
        return losses.double().mean().exp().item()


def largest(values: Tensor) -> float:
    """Largest |value|; infinite where one is not a number."""
    return values.abs().nan_to_num(nan=float("inf")).max().item()

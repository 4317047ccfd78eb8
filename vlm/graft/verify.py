"""The proof: on text alone the hybrid is the language donor.

Four comparisons in float32 on a few texts, each of which a careless graft fails:
1. every text tensor of the hybrid equals the donor's, bit for bit;
2. the hybrid, through its M-RoPE, against our decoder on the donor's own files with plain
   rope, which shares no rope code with M-RoPE: the difference must be exactly 0;
3. the same against transformers' own Qwen3 on the donor's files, an independent witness: at
   most 1e-5 of the largest logit, since its kernels sum in another order;
4. the most likely next token agrees everywhere.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import Batch, Segments
from vlm.checkpoint import CheckpointError, TensorReader, load_language_model, load_model
from vlm.config import VLMConfig
from vlm.graft.tokenizer import load_tokenizer
from vlm.hf_config import read_text_config
from vlm.rope import mrope_positions
from vlm.vision import plan_vision

WITNESS_TOLERANCE = 1e-5
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "How many apples are left if you had 12 and gave away 5? Think step by step.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "视觉塔接到语言模型上，两者都不变。",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "Une phrase courte.",
)


@dataclass(frozen=True)
class Proof:
    """What `verify` measured."""

    tokens: int
    differing_tensors: list[str]
    max_abs_delta: float
    """Against our decoder on the donor with plain rope."""
    witness_max_abs_delta: float
    """Against transformers' Qwen3, as a share of the largest |logit|."""
    top1_agreement: float
    """With the witness, 0..1."""

    @property
    def holds(self) -> bool:
        return (
            not self.differing_tensors
            and self.max_abs_delta == 0.0
            and self.witness_max_abs_delta <= WITNESS_TOLERANCE
            and self.top1_agreement == 1.0
        )

    def as_json(self) -> dict:
        return asdict(self) | {"holds": self.holds}


@torch.inference_mode()
def verify(model_dir: Path, llm_dir: Path) -> Proof:
    """Compare a hybrid's text side with its language donor.

    Raises:
        ConfigError, CheckpointError: a directory that cannot be read.
    """
    tokenizer = load_tokenizer(llm_dir)
    texts = [torch.tensor(tokenizer.encode(text).ids) for text in TEXTS]
    differing = differing_tensors(TensorReader(model_dir), TensorReader(llm_dir))

    model = load_model(model_dir)
    batch = text_batch(texts, model.config)
    known = read_text_config(llm_dir).vocab_size  # a grown vocabulary has rows the donor lacks
    hybrid = F.linear(model(batch), model.head_weight[:known])
    del model

    donor = load_language_model(llm_dir)
    reference = donor(batch.input_ids, batch.segments, batch.target_rows)
    reference = F.linear(reference, donor.head_weight)
    del donor

    witness = witness_logits(llm_dir, texts)
    return Proof(
        tokens=len(batch.input_ids),
        differing_tensors=differing,
        max_abs_delta=_largest(hybrid - reference),
        witness_max_abs_delta=_largest(hybrid - witness) / _largest(witness),
        top1_agreement=(hybrid.argmax(-1) == witness.argmax(-1)).float().mean().item(),
    )


def differing_tensors(hybrid: TensorReader, donor: TensorReader) -> list[str]:
    """Names of the donor's tensors that the hybrid lacks or holds with other values."""
    held, differing = set(hybrid.names()), []
    for name in donor.names():
        if name not in held:
            if name != "lm_head.weight":  # absent where tied; the logits settle it
                differing.append(name)
            continue
        theirs = donor.get(name)
        ours = hybrid.get(name)[: len(theirs)]
        if ours.shape != theirs.shape or not torch.equal(ours.float(), theirs.float()):
            differing.append(name)
    return differing


def text_batch(texts: list[Tensor], config: VLMConfig) -> Batch:
    """Texts packed, with every row asked for, and the dummy image that text alone carries."""
    ids = torch.cat(texts)
    merge = config.vision.spatial_merge_size
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([mrope_positions(text, [], config) for text in texts], dim=1),
        segments=Segments.of([len(text) for text in texts]),
        target_rows=torch.arange(len(ids)),
        targets=ids,
        weights=None,
        visual_rows=torch.zeros(0, dtype=torch.int64),
        patches=torch.zeros(merge**2, config.vision.patch_dim, dtype=torch.uint8),
        vision=plan_vision([(1, merge, merge)], config.vision),
        ids=(),
    )


def witness_logits(llm_dir: Path, texts: list[Tensor]) -> Tensor:
    """(T, vocab) float32: transformers' own Qwen3 on each text by itself."""
    from transformers import Qwen3ForCausalLM

    model, loading = Qwen3ForCausalLM.from_pretrained(
        llm_dir,
        dtype=torch.float32,
        key_mapping={r"^model\.language_model\.": "model."},
        output_loading_info=True,
    )
    if loading["missing_keys"]:  # transformers would go on with random weights
        raise CheckpointError(f"transformers found no {min(loading['missing_keys'])} in {llm_dir}")
    model.eval()
    return torch.cat([model(input_ids=text[None]).logits[0] for text in texts])


def _largest(values: Tensor) -> float:
    """Largest |value|; infinite where one is not a number."""
    return values.abs().nan_to_num(nan=float("inf")).max().item()

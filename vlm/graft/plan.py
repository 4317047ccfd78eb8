"""What becomes of every tensor of both donors, decided before anything is read or written.

The hybrid's config is derived from the donors' own: every text key from the language donor,
vision and media tokens from the vision-language donor. Copying "by matching name" instead
silently drops Qwen3's q_norm and k_norm; here a tensor without a stated fate is an error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from vlm.checkpoint import CheckpointError, TensorReader
from vlm.hf_config import MEDIA_TOKENS, parse_config, parse_text_config
from vlm.model import VisionLanguageModel

MERGER = "model.visual.merger."
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
NOT_TEXT = (
    "architectures",
    "model_type",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
"""Keys of a language donor's config that are not carried over word for word."""

Action = Literal["copied", "initialised", "resized", "dropped"]


@dataclass(frozen=True)
class Step:
    """The fate of one tensor."""

    name: str
    action: Action
    donor: Literal["vision", "llm"] | None
    """Where it comes from; None for a fresh tensor."""
    shape: tuple[int, ...]
    reason: str
    added_rows: int = 0
    """Fresh rows at the end of a resized tensor."""


def derive_config(vision_raw: dict, llm_raw: dict, vocab_size: int) -> dict:
    """The hybrid's `config.json` from the donors' JSON objects.

    Args:
        vocab_size: rows of the embedding: the language donor's, or more where the tokenizer
            needs them.

    Raises:
        ConfigError: an unsupported donor, or an mrope_section that does not fit head_dim.
    """
    vision, llm = parse_config(vision_raw), parse_text_config(llm_raw)
    text_raw = llm_raw.get("text_config", llm_raw)
    vision_text = vision_raw.get("text_config", vision_raw)
    kept = {key: value for key, value in text_raw.items() if key not in NOT_TEXT}
    kept["layer_types"] = ["full_attention"] * llm.num_hidden_layers
    rope = {
        "rope_type": "default",
        "rope_theta": llm.rope_theta,
        "mrope_section": scale_mrope_section(vision.text.mrope_section, llm.head_dim),
    }
    text = kept | {
        "model_type": "graft_vl_text",
        "vocab_size": vocab_size,
        "head_dim": llm.head_dim,
        "rope_parameters": rope,
        "tie_word_embeddings": llm.tie_word_embeddings,
    }
    tokens = {name: vision_raw.get(name, vision_text.get(name)) for name in MEDIA_TOKENS}
    return {
        "architectures": ["GraftVLForConditionalGeneration"],
        "model_type": "graft_vl",
        "dtype": text_raw.get("dtype") or text_raw.get("torch_dtype") or "float32",
        # written at both levels: readers differ in which one they trust
        "tie_word_embeddings": llm.tie_word_embeddings,
        **tokens,
        "text_config": text,
        "vision_config": vision_raw["vision_config"] | {"out_hidden_size": llm.hidden_size},
    }


def scale_mrope_section(section: tuple[int, ...] | None, head_dim: int) -> list[int]:
    """The vision-language donor's section, stretched to head_dim / 2 frequencies.

    Raises CheckpointError with both numbers where that leaves fractions.
    """
    if section is None:
        raise CheckpointError("the vision donor's config has no mrope_section")
    half, total = head_dim // 2, sum(section)
    if any(part * half % total for part in section):
        raise CheckpointError(
            f"mrope_section {list(section)} covers {total} frequencies and cannot be scaled to "
            f"the language donor's {half} (head_dim {head_dim}) in whole numbers"
        )
    return [part * half // total for part in section]


def plan_tensors(config: dict, vision: TensorReader, llm: TensorReader) -> list[Step]:
    """A step for every tensor of the hybrid, then one for every donor tensor that is dropped.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no stated fate.
    """
    with torch.device("meta"):
        model = VisionLanguageModel(parse_config(config))
    steps, used = [], {"vision": set(), "llm": set()}
    for name, tensor in model.state_dict().items():
        step = _plan_one(name, tuple(tensor.shape), vision, llm)
        steps.append(step)
        if step.donor:
            used[step.donor].add(name)
    steps += _dropped("vision", set(vision.names()) - used["vision"], vision)
    steps += _dropped("llm", set(llm.names()) - used["llm"], llm, config["tie_word_embeddings"])
    return steps


def _plan_one(name: str, shape: tuple[int, ...], vision: TensorReader, llm: TensorReader) -> Step:
    if name.startswith(MERGER):
        return Step(name, "initialised", None, shape, "a fresh merger into the new width")
    donor = "vision" if name.startswith("model.visual.") else "llm"
    reader = vision if donor == "vision" else llm
    if name not in reader.names():
        raise CheckpointError(f"{reader.dir} lacks {name}")
    held = reader.shape(name)
    if held == shape:
        what = "vision tower" if donor == "vision" else "language model"
        return Step(name, "copied", donor, shape, what)
    if name in (EMBEDDING, HEAD) and held[1:] == shape[1:] and held[0] < shape[0]:
        return Step(name, "resized", donor, shape, "rows for new tokens", shape[0] - held[0])
    raise CheckpointError(
        f"{reader.dir}: {name} has shape {list(held)}, the hybrid needs {list(shape)}"
    )


def _dropped(donor, names: Iterable[str], reader: TensorReader, tied: bool = False) -> list[Step]:
    steps = []
    for name in sorted(names):
        if donor == "vision" and name.startswith(MERGER):
            reason = "the merger into the old language model's width"
        elif donor == "vision" and name.startswith(("model.language_model.", HEAD)):
            reason = "the old language model"
        elif donor == "llm" and name == HEAD and tied:
            reason = "the head is tied to the embedding"
        else:
            raise CheckpointError(f"{reader.dir} holds {name}, which has no place in the hybrid")
        steps.append(Step(name, "dropped", donor, reader.shape(name), reason))
    return steps

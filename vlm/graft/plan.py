"""What becomes of every tensor of both donors, decided before anything is read or written.

The hybrid's config is derived from the donors' own: every text key from the language donor,
vision and media tokens from the vision-language donor. Copying "by matching name" instead
silently drops Qwen3's q_norm and k_norm; here a tensor without a stated fate is an error.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from vlm.checkpoint import CheckpointError, TensorReader
from vlm.config import TextConfig
from vlm.graft.donors import EMBEDDING, HEAD, LAYERS, layer_of
from vlm.graft.options import BuildOptions
from vlm.hf_config import MEDIA_TOKENS, ConfigError, parse_config, parse_text_config
from vlm.model import VisionLanguageModel
from vlm.tensor_file import DTYPES, NAMES

MERGER = "model.visual.merger."
QK_NORMS = (".self_attn.q_norm.weight", ".self_attn.k_norm.weight")
QKV_BIASES = (".self_attn.q_proj.bias", ".self_attn.k_proj.bias", ".self_attn.v_proj.bias")
LAYER_DROPPED = "beyond the layers that --llm_layers keeps"
QK_NORM_DROPPED = "QK-norm, which Qwen2-style attention has no place for"
NOT_TEXT = (
    "architectures",
    "attention_bias",
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
    dtype: str
    """As safetensors name it: of what is written, or of what is dropped."""
    reason: str
    added_rows: int = 0
    """Fresh rows at the end of a resized tensor."""
    fill: str = ""
    """How what is fresh is initialised: `normal`, `xavier_uniform`, `zeros` or `ones`."""


def derive_config(vision_raw: dict, llm_raw: dict, vocab_size: int, options: BuildOptions) -> dict:
    """The hybrid's `config.json` from the donors' JSON objects, but for its `written_dtype`.

    Args:
        vocab_size: rows of the embedding: the language donor's, or more where the tokenizer
            needs them.

    Raises:
        ConfigError: an unsupported donor, an mrope_section that does not fit head_dim, more
            layers than there are, or a shape that the literal variant cannot have.
    """
    vision, llm = parse_config(vision_raw), parse_text_config(llm_raw)
    text_raw = llm_raw.get("text_config", llm_raw)
    vision_text = vision_raw.get("text_config", vision_raw)
    literal = options.variant == "literal"
    if literal:
        _check_literal(llm)
    layers = _kept_layers(llm, options)
    text = {key: value for key, value in text_raw.items() if key not in NOT_TEXT}
    text |= {
        "model_type": "qwen2_5_vl_text" if literal else "graft_vl_text",
        "vocab_size": vocab_size,
        "head_dim": llm.head_dim,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": llm.rope_theta,
            "mrope_section": scale_mrope_section(vision.text.mrope_section, llm.head_dim),
        },
        "tie_word_embeddings": llm.tie_word_embeddings,
    }
    if type(text.get("max_window_layers")) is int:
        text["max_window_layers"] = min(text["max_window_layers"], layers)
    if not literal:  # stock Qwen2.5-VL has biases and no key for them
        text["attention_bias"] = False
    tokens = {name: vision_raw.get(name, vision_text.get(name)) for name in MEDIA_TOKENS}
    tower = vision_raw["vision_config"]
    tower = {key: value for key, value in tower.items() if key not in ("dtype", "torch_dtype")}
    kind = "Qwen2_5_VL" if literal else "GraftVL"
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": "qwen2_5_vl" if literal else "graft_vl",
        # written at both levels: readers differ in which one they trust
        "tie_word_embeddings": llm.tie_word_embeddings,
        **tokens,
        "text_config": text,
        "vision_config": tower | {"out_hidden_size": llm.hidden_size},
    }


def _check_literal(llm: TextConfig) -> None:
    if llm.num_attention_heads * llm.head_dim != llm.hidden_size:
        raise ConfigError(
            "the literal variant cannot hold this language donor: Qwen2.5-VL's attention takes "
            f"hidden_size / heads for its head_dim, and {llm.num_attention_heads} heads of "
            f"{llm.head_dim} are not the hidden size {llm.hidden_size}; use --variant exact"
        )


def _kept_layers(llm: TextConfig, options: BuildOptions) -> int:
    layers = options.llm_layers
    if layers is None:
        return llm.num_hidden_layers
    if not 1 <= layers <= llm.num_hidden_layers:
        raise ConfigError(
            f"--llm_layers {layers}: the language donor has {llm.num_hidden_layers} layers; give "
            f"1 to {llm.num_hidden_layers}"
        )
    return layers


def scale_mrope_section(section: tuple[int, ...], head_dim: int) -> list[int]:
    """The vision-language donor's section, stretched to head_dim / 2 frequencies.

    Raises ConfigError with both numbers where that leaves fractions.
    """
    half, total = head_dim // 2, sum(section)
    if any(part * half % total for part in section):
        raise ConfigError(
            f"mrope_section {list(section)} covers {total} frequencies and cannot be scaled to "
            f"the language donor's {half} (head_dim {head_dim}) in whole numbers"
        )
    return [part * half // total for part in section]


def written_dtype(steps: Sequence[Step]) -> str:
    """What most parameters of the hybrid are written in, as `config.json` names it.

    The donors' configs are not asked: conversion tools leave there what a model once was.
    """
    sizes: Counter[str] = Counter()
    for step in steps:
        if step.action != "dropped":
            sizes[step.dtype] += prod(step.shape)
    return str(DTYPES[sizes.most_common(1)[0][0]]).removeprefix("torch.")


def plan_tensors(
    config: dict, vision: TensorReader, llm: TensorReader, options: BuildOptions
) -> list[Step]:
    """A step for every tensor of the hybrid, then one for every donor tensor that is dropped.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no stated fate.
    """
    with torch.device("meta"):
        model = VisionLanguageModel(parse_config(config))
    readers = {"vision": vision, "llm": llm}
    steps: list[Step] = []
    used: dict[str, set[str]] = {"vision": set(), "llm": set()}
    for name, tensor in model.state_dict().items():
        step = _plan_one(name, tuple(tensor.shape), readers, options)
        steps.append(step)
        if step.donor:
            used[step.donor].add(name)
    for donor, reader in readers.items():
        for name in sorted(set(reader.names()) - used[donor]):
            reason = _why_dropped(donor, name, reader, config, options)
            shape, dtype = reader.shape(name), reader.dtype(name)
            steps.append(Step(name, "dropped", donor, shape, dtype, reason))
    return steps


def _plan_one(
    name: str, shape: tuple[int, ...], readers: dict[str, TensorReader], options: BuildOptions
) -> Step:
    donor = "vision" if name.startswith("model.visual.") else "llm"
    reader = readers[donor]
    own = NAMES[getattr(torch, options.dtype)] if options.dtype else None
    fresh_dtype = own or readers["llm"].dtype(EMBEDDING)
    if name.startswith(MERGER) and not _is_kept(name, shape, reader, options):
        why = "a fresh merger into the new width"
        return Step(name, "initialised", None, shape, fresh_dtype, why, fill=_fill(name, options))
    if name.endswith(QKV_BIASES) and donor == "llm":
        why = "Qwen2-style attention has this bias, Qwen3's has none"
        return Step(name, "initialised", None, shape, fresh_dtype, why, fill="zeros")
    if name not in reader.names():
        raise CheckpointError(f"{reader.dir} lacks {name}")
    held, dtype = reader.shape(name), own or reader.dtype(name)
    if held == shape:
        what = {"vision": "vision tower", "llm": "language model"}[donor]
        if name.startswith(MERGER):
            what = "the vision donor's merger, whose shape fits"
        return Step(name, "copied", donor, shape, dtype, what)
    if name in (EMBEDDING, HEAD) and held[1:] == shape[1:] and held[0] < shape[0]:
        added = shape[0] - held[0]
        why = f"{added} rows for new tokens"
        return Step(name, "resized", donor, shape, dtype, why, added, "normal")
    raise CheckpointError(
        f"{reader.dir}: {name} has shape {list(held)}, the hybrid needs {list(shape)}"
    )


def _is_kept(
    name: str, shape: tuple[int, ...], vision: TensorReader, options: BuildOptions
) -> bool:
    """`--merger_init donor` makes anew only what has another shape in the hybrid."""
    kept = options.merger_init == "donor"
    return kept and name in vision.names() and vision.shape(name) == shape


def _fill(name: str, options: BuildOptions) -> str:
    if name.endswith(".bias"):
        return "zeros"
    if name.startswith(f"{MERGER}ln_q"):
        return "ones"
    return "xavier_uniform" if options.merger_init == "xavier" else "normal"


def _why_dropped(
    donor: str, name: str, reader: TensorReader, config: dict, options: BuildOptions
) -> str:
    if donor == "vision" and name.startswith(MERGER):
        return "the merger into the old language model's width"
    if donor == "vision" and name.startswith(("model.language_model.", HEAD)):
        return "the old language model"
    if donor == "llm" and name == HEAD and config["tie_word_embeddings"]:
        return "the head is tied to the embedding"
    if donor == "llm" and name.startswith(LAYERS):
        number = layer_of(name)
        if number is not None and number >= config["text_config"]["num_hidden_layers"]:
            return LAYER_DROPPED
        if options.variant == "literal" and name.endswith(QK_NORMS):
            return QK_NORM_DROPPED
    raise CheckpointError(f"{reader.dir} holds {name}, which has no place in the hybrid")

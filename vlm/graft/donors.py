"""What can be known to be wrong with a pair of donors before a tensor's values are read.

Every check raises ConfigError or CheckpointError with one sentence that says what to do.
"""

import re
from pathlib import Path

from vlm.checkpoint import FLOATS, CheckpointError, TensorReader
from vlm.hf_config import (
    TEXT_TYPES,
    VISION_LANGUAGE_TYPES,
    ConfigError,
    parse_config,
    parse_text_config,
    read_json,
)

DENSE_SIZES = "0.6B, 1.7B, 4B, 8B, 14B, 32B"
LAYERS = "model.language_model.layers."
BLOCKS = "model.visual.blocks."
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"

WHY_NOT = {
    "qwen2_vl": "is a Qwen2-VL, whose tower has no windows and other layers; --vision takes a "
    "Qwen2.5-VL",
    "qwen2_5_omni": "is a Qwen2.5-Omni; --vision takes a Qwen2.5-VL",
    "qwen3_vl": "is a Qwen3-VL, whose tower feeds several layers of the decoder (DeepStack); "
    "--vision takes a Qwen2.5-VL",
    "qwen3_vl_moe": "is a Qwen3-VL with a mixture of experts; --vision takes a Qwen2.5-VL and "
    f"--llm a dense Qwen3 ({DENSE_SIZES})",
    "qwen3_moe": f"is a mixture of experts; --llm takes a dense Qwen3 ({DENSE_SIZES})",
    "qwen3_next": f"is a Qwen3-Next; --llm takes a dense Qwen3 ({DENSE_SIZES})",
    "qwen2": f"is a Qwen2 or Qwen2.5, which has no QK-norm; --llm takes a dense Qwen3 "
    f"({DENSE_SIZES})",
}
"""Models that are often mistaken for donors."""


def read_donor_configs(vision_dir: Path, llm_dir: Path) -> tuple[dict, dict]:
    """`config.json` of the vision and of the language donor, both fit for a graft.

    Raises:
        ConfigError: not such donors, or the right ones the wrong way round.
    """
    paths = [Path(folder) / "config.json" for folder in (vision_dir, llm_dir)]
    vision, llm = (read_json(path) for path in paths)
    kinds = vision.get("model_type"), llm.get("model_type")
    if kinds[0] in TEXT_TYPES and kinds[1] in VISION_LANGUAGE_TYPES:
        raise ConfigError(
            f"--vision and --llm are swapped: {vision_dir} is the language model ({kinds[0]}) and "
            f"{llm_dir} the vision-language model ({kinds[1]})"
        )
    wanted = (
        (VISION_LANGUAGE_TYPES, "--vision takes a Qwen2.5-VL"),
        (TEXT_TYPES, f"--llm takes a dense Qwen3 ({DENSE_SIZES})"),
    )
    for path, kind, (accepted, what) in zip(paths, kinds, wanted, strict=True):
        if kind not in accepted:
            why = WHY_NOT.get(str(kind), f"is of model_type {kind!r}; {what}")
            raise ConfigError(f"{path} {why}")
    if parse_config(vision, paths[0]).text.mrope_section is None:
        raise ConfigError(f"{paths[0]} has no mrope_section; --vision takes a Qwen2.5-VL")
    parse_text_config(llm, paths[1])
    return vision, llm


def check_donor_tensors(
    vision_raw: dict, vision: TensorReader, llm_raw: dict, llm: TensorReader
) -> None:
    """Layers, vocabulary and dtypes of the files agree with the configs; `plan_tensors` sees to
    the other shapes.

    Raises:
        CheckpointError: more or fewer layers or rows of the embedding than config.json says, or a
            dtype without a plain floating-point value per weight.
    """
    depth = parse_config(vision_raw).vision.depth
    text = parse_text_config(llm_raw)
    _check_rows(llm, text.vocab_size)
    for reader, prefix, count in (
        (vision, BLOCKS, depth),
        (llm, LAYERS, text.num_hidden_layers),
    ):
        held = {layer_of(name, prefix) for name in reader.names()} - {None}
        if len(held) != count or max(held) != count - 1:
            raise CheckpointError(
                f"{reader.dir}: config.json says {count} layers and the files hold "
                f"{_spans(held)}; they are not of one model, download it again"
            )
        for name in reader.names():
            dtype = reader.dtype(name)
            if dtype not in FLOATS:
                raise CheckpointError(
                    f"{reader.dir} holds {name} as {dtype}, as quantised models do; give the "
                    f"unquantised one ({', '.join(FLOATS)})"
                )


def layer_of(name: str, prefix: str = LAYERS) -> int | None:
    """The number of the layer that a tensor belongs to, or None."""
    found = re.match(rf"{re.escape(prefix)}(\d{{1,6}})\.", name, re.ASCII)
    return int(found[1]) if found else None


def _check_rows(llm: TensorReader, vocab_size: int) -> None:
    """A file with fewer would pass for one whose vocabulary the hybrid enlarges."""
    names = llm.names()
    if EMBEDDING not in names:
        raise CheckpointError(f"{llm.dir} lacks {EMBEDDING}")
    for name in (EMBEDDING, HEAD):
        if name in names and llm.shape(name)[:1] != (vocab_size,):
            raise CheckpointError(
                f"{llm.dir}: {name} has shape {list(llm.shape(name))}, but vocab_size of "
                f"config.json is {vocab_size}; they are not of one model, download it again"
            )


def _spans(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> `4 (0-2, 5)`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    return f"{len(numbers)} ({shown})" if spans else "none"

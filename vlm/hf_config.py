"""The hub's `config.json` <-> our dataclasses.

Read are `qwen2_5_vl` (flat, as on the hub, or nested, as transformers 5 saves it), `qwen3` and
our own `graft_vl`. What we cannot compute exactly is refused by name, never ignored.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.config import TextConfig, VisionConfig, VLMConfig

VISION_LANGUAGE_TYPES = ("qwen2_5_vl", "graft_vl")
TEXT_TYPES = ("qwen3",)
MEDIA_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
JSON_NAMES = {dict: "a JSON object", list: "a list", int: "a whole number"}


class ConfigError(ValueError):
    """A `config.json` that is missing, damaged or describes a model we do not build."""


def read_json(path: Path) -> dict:
    """A JSON object from a file; ConfigError names the file and what is wrong with it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the directory of a saved model") from None
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 and JSON are ValueErrors
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def read_config(model_dir: Path | str) -> VLMConfig:
    """The config of a vision-language model's directory, in any accepted layout."""
    path = Path(model_dir) / "config.json"
    return parse_config(read_json(path), path)


def read_text_config(model_dir: Path | str) -> TextConfig:
    """The decoder's config of a language model's or a vision-language model's directory."""
    path = Path(model_dir) / "config.json"
    return parse_text_config(read_json(path), path)


def parse_config(raw: dict, path: Path | str = "config.json") -> VLMConfig:
    """VLMConfig from the JSON object of a vision-language model."""
    _check_type(raw, VISION_LANGUAGE_TYPES, "vision-language model", path)
    text = _text_part(raw, path)
    tokens = {name: raw.get(name, text.get(name)) for name in MEDIA_TOKENS}
    missing = [name for name, value in tokens.items() if value is None]
    if missing:
        raise ConfigError(f"{path} has no {missing[0]}")
    vision = _need(raw, "vision_config", path, dict)
    with _named(path):
        return VLMConfig(_parse_vision(vision, path), parse_text_config(raw, path), **tokens)


def parse_text_config(raw: dict, path: Path | str = "config.json") -> TextConfig:
    """TextConfig from the JSON object of a language model or a vision-language model."""
    kind = _check_type(raw, VISION_LANGUAGE_TYPES + TEXT_TYPES, "dense Qwen model", path)
    text = _text_part(raw, path)
    rope = _rope(text, path)
    _refuse_unsupported(text, rope, path)
    qwen3_like = kind != "qwen2_5_vl"
    section = _need(rope, "mrope_section", path, list) if rope.get("mrope_section") else None
    heads = _need(text, "num_attention_heads", path, int)
    hidden = _need(text, "hidden_size", path, int)
    theta = rope.get("rope_theta") or _need(text, "rope_theta", path)
    with _named(path):
        return TextConfig(
            vocab_size=_need(text, "vocab_size", path),
            hidden_size=hidden,
            intermediate_size=_need(text, "intermediate_size", path),
            num_hidden_layers=_need(text, "num_hidden_layers", path),
            num_attention_heads=heads,
            num_key_value_heads=_need(text, "num_key_value_heads", path),
            head_dim=text.get("head_dim") or hidden // max(heads, 1),
            rope_theta=float(theta) if type(theta) is int else theta,
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            # transformers reads the tie flag at the top level of a nested config
            tie_word_embeddings=raw.get(
                "tie_word_embeddings", text.get("tie_word_embeddings", False)
            ),
            qk_norm=text.get("qk_norm", qwen3_like),
            qkv_bias=not qwen3_like,
            mrope_section=tuple(section) if section else None,
            max_position_embeddings=text.get("max_position_embeddings", 32768),
        )


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """What our dataclasses refuse, as an error that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse_vision(raw: dict, path: Path | str) -> VisionConfig:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{path}: vision hidden_act {raw['hidden_act']!r}; only 'silu' is built")
    required = ("depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size")
    optional = (
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "window_size",
        "in_channels",
        "tokens_per_second",
    )
    values = {name: _need(raw, name, path) for name in required}
    values |= {name: raw[name] for name in optional if name in raw}
    if "in_chans" in raw:  # the hub's spelling
        values.setdefault("in_channels", raw["in_chans"])
    full = tuple(_need(raw, "fullatt_block_indexes", path, list))
    return VisionConfig(**values, fullatt_block_indexes=full)


def _check_type(raw: dict, accepted: tuple[str, ...], what: str, path: Path | str) -> str:
    kind = raw.get("model_type")
    if kind not in accepted:
        raise ConfigError(f"{path} is of model_type {kind!r}, not a {what} ({', '.join(accepted)})")
    if "quantization_config" in raw:
        raise ConfigError(f"{path} is a quantised model; give the unquantised one")
    return kind


def _text_part(raw: dict, path: Path | str) -> dict:
    """The decoder's keys, which the hub's configs have at the top."""
    return _need(raw, "text_config", path, dict) if "text_config" in raw else raw


def _rope(text: dict, path: Path | str) -> dict:
    for name in ("rope_parameters", "rope_scaling"):
        if text.get(name):
            return _need(text, name, path, dict)
    return {}


def _refuse_unsupported(text: dict, rope: dict, path: Path | str) -> None:
    for kind in (rope.get("rope_type"), rope.get("type")):
        if kind not in (None, "default", "mrope"):
            raise ConfigError(f"{path}: rope of type {kind!r}; only 'default' and 'mrope'")
    for part in (text, rope):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise ConfigError(f"{path}: partial_rotary_factor; the decoder turns whole heads")
    layers = text.get("layer_types") or []
    if not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}:
        raise ConfigError(f"{path}: layer_types other than full_attention; no other is built")
    if text.get("use_sliding_window"):
        raise ConfigError(f"{path}: use_sliding_window is true; the decoder attends in full")
    if text.get("attention_bias"):
        raise ConfigError(f"{path}: attention_bias is true; dense Qwen3 has none")
    if text.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{path}: hidden_act {text['hidden_act']!r}; only 'silu' is built")


def _need(raw: dict, name: str, path: Path | str, kind: type | None = None):
    """A value that must be there, of a type that is needed before the dataclasses check it."""
    value = raw.get(name)
    if value is None:
        raise ConfigError(f"{path} has no {name}")
    if kind is not None and type(value) is not kind:
        raise ConfigError(f"{path}: {name} is {value!r:.60}, not {JSON_NAMES[kind]}")
    return value

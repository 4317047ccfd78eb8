"""Tiny models in the real files' layout, for tests: random weights, real tokenizer and template."""

import json
import shutil
from pathlib import Path

import torch

from vlm.checkpoint import COMPANION_FILES, save_model
from vlm.hf_config import parse_config, parse_text_config
from vlm.model import LanguageModel, VisionLanguageModel, initialise

GOLDEN_MODEL = Path(__file__).parent / "golden" / "model"


def hybrid_config(tie: bool = False, hidden_size: int = 48) -> dict:
    """The `config.json` of a tiny hybrid whose head_dim is hidden_size / heads at 128 alone."""
    vl = json.loads((GOLDEN_MODEL / "config.json").read_text())
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "architectures": ["GraftVLForConditionalGeneration"],
        "model_type": "graft_vl",
        "tie_word_embeddings": tie,
        **{name: vl[name] for name in tokens},
        "text_config": {
            "model_type": "graft_vl_text",
            "vocab_size": 4096,
            "hidden_size": hidden_size,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tie,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6],
            },
        },
        "vision_config": vl["vision_config"] | {"out_hidden_size": hidden_size},
    }


def hybrid(seed: int = 0, tie: bool = False, hidden_size: int = 48) -> VisionLanguageModel:
    """A tiny random hybrid in float32."""
    model = VisionLanguageModel(parse_config(hybrid_config(tie, hidden_size)))
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights, and norms and biases that are neither ones nor zeros."""
    generator = torch.Generator().manual_seed(seed)
    initialise(module, generator, std=0.1)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def write_hybrid(folder: Path, seed: int = 0, tie: bool = False, hidden_size: int = 48) -> Path:
    """`hybrid(...)` as a checkpoint directory; returns it."""
    model = hybrid(seed, tie, hidden_size)
    save_model(folder, model.state_dict().items(), GOLDEN_MODEL, hybrid_config(tie, hidden_size))
    return Path(folder)


def copy_companions(folder: Path) -> None:
    """Tokenizer, template and processor files of the golden model into `folder`."""
    for name in COMPANION_FILES:
        if (GOLDEN_MODEL / name).exists():
            shutil.copyfile(GOLDEN_MODEL / name, folder / name)


def write_vision_donor(
    folder: Path, nested: bool = False, new_keys: bool = False, tie: bool = False
) -> Path:
    """A tiny random Qwen2.5-VL in {flat, nested config} x {hub, new keys}; returns its folder."""
    raw = json.loads((GOLDEN_MODEL / "config.json").read_text())
    raw["tie_word_embeddings"] = tie
    model = VisionLanguageModel(parse_config(raw))
    randomise(model, seed=11)
    if nested:
        text_keys = set(raw) - {"architectures", "model_type", "vision_config", "image_token_id"}
        text_keys -= {"video_token_id", "vision_start_token_id", "vision_end_token_id"}
        text = {key: raw.pop(key) for key in sorted(text_keys)}
        text["rope_parameters"] = {
            "rope_type": "default",
            "type": "mrope",
            "rope_theta": text.pop("rope_theta"),
            "mrope_section": text.pop("rope_scaling")["mrope_section"],
        }
        raw |= {
            "tie_word_embeddings": tie,
            "text_config": text | {"model_type": "qwen2_5_vl_text"},
        }
    _write_donor(folder, model, raw, new_keys, max_shard_bytes=400_000)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["added_tokens"][-4:]  # Qwen3 alone has <think> and <tool_response>
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_llm_donor(
    folder: Path,
    nested: bool = False,
    new_keys: bool = False,
    tie: bool = True,
    vocab_size: int = 4096,
    hidden_size: int = 48,
) -> Path:
    """A tiny random Qwen3; returns its folder."""
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": 96,
        "max_position_embeddings": 40960,
        "max_window_layers": 3,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": tie,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
    model = LanguageModel(parse_text_config(raw))
    randomise(model, seed=12)
    if nested:
        theta = raw.pop("rope_theta")
        raw.pop("rope_scaling")
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return _write_donor(folder, model, raw, new_keys)


def _write_donor(folder: Path, model, raw: dict, new_keys: bool, max_shard_bytes=10**9) -> Path:
    state = model.state_dict()
    if not new_keys:  # the hub's names
        state = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): t
            for name, t in state.items()
        }
    save_model(folder, state.items(), GOLDEN_MODEL, raw, max_shard_bytes)
    return folder

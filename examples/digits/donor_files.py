"""How the donors lie on disk: configs and files in the layout of the hub's real ones."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor, nn

from examples.digits.vocabulary import write_tokenizer
from vlm.checkpoint import save_model, write_json
from vlm.model import LanguageModel, VisionLanguageModel
from vlm.vision import IMAGE_MEAN, IMAGE_STD

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
VISION_VOCABULARY, LLM_VOCABULARY = 448, 384
"""Rows of the embeddings: more than there are tokens, and not the same, as with the real two."""
SHARD_BYTES = 2_000_000


def vision_config(tokenizer: Tokenizer) -> dict:
    """`config.json` of the tiny Qwen2.5-VL, flat as on the hub."""
    token = tokenizer.token_to_id
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_token_id": token("<|vision_pad|>"),
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.02,
        "intermediate_size": 192,
        "max_position_embeddings": 128000,
        "max_window_layers": 2,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": 96,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vocab_size": VISION_VOCABULARY,
    }


def llm_config(tokenizer: Tokenizer) -> dict:
    """`config.json` of the tiny Qwen3, flat as on the hub."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": 40960,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": LLM_VOCABULARY,
    }


def write_vision_donor(
    out: Path, model: VisionLanguageModel, config: dict, tokenizer: Tokenizer
) -> None:
    """The whole of a Qwen2.5-VL directory."""
    template = TEMPLATE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        write_tokenizer(files, tokenizer, template)
        write_json(files / "chat_template.json", {"chat_template": template})
        preprocessor = {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": IMAGE_MEAN,
            "image_std": IMAGE_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
        write_json(files / "preprocessor_config.json", preprocessor)
        generation = _generation_config(tokenizer) | {
            "do_sample": True,
            "repetition_penalty": 1.05,
            "temperature": 1e-06,
        }
        write_json(files / "generation_config.json", generation)
        save_model(out, hub_tensors(model), files, config, SHARD_BYTES)


def write_llm_donor(out: Path, model: LanguageModel, config: dict, tokenizer: Tokenizer) -> None:
    """The whole of a Qwen3 directory."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        write_tokenizer(files, tokenizer, TEMPLATE.read_text(encoding="utf-8"))
        generation = _generation_config(tokenizer) | {"temperature": 0.6, "top_p": 0.95}
        write_json(files / "generation_config.json", generation | {"top_k": 20, "do_sample": True})
        save_model(out, hub_tensors(model), files, config, SHARD_BYTES)


def _generation_config(tokenizer: Tokenizer) -> dict:
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    return {"bos_token_id": ends[1], "eos_token_id": ends, "pad_token_id": ends[1]}


def hub_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The state dict under the hub's names: `visual.*`, `model.layers.*`."""
    for name, tensor in model.state_dict().items():
        name = name.replace("model.visual.", "visual.")
        yield name.replace("model.language_model.", "model."), tensor

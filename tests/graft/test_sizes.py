"""The real sizes: configs of every dense Qwen3 on every Qwen2.5-VL, and full-size counts."""

import pytest
import torch

from vlm.graft.options import BuildOptions
from vlm.graft.plan import derive_config
from vlm.hf_config import ConfigError, parse_config
from vlm.model import VisionLanguageModel

EXACT, LITERAL = BuildOptions(), BuildOptions(variant="literal")

# As the hubs' config.json have them: hidden, layers, heads, key/value heads, FFN, tied.
QWEN3 = {
    "0.6B": (1024, 28, 16, 8, 3072, True),
    "1.7B": (2048, 28, 16, 8, 6144, True),
    "4B": (2560, 36, 32, 8, 9728, True),
    "8B": (4096, 36, 32, 8, 12288, False),
    "14B": (5120, 40, 40, 8, 17408, False),
    "32B": (5120, 64, 64, 8, 25600, False),
}
# hidden, layers, heads, key/value heads, FFN, vocabulary, tied, vision FFN.
QWEN2_5_VL = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}
VOCABULARY = 151936
LITERAL_FITS = {"1.7B", "8B", "14B"}


def llm_config(size: str) -> dict:
    hidden, layers, heads, kv, ffn, tie = QWEN3[size]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tie,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }


def vision_config(size: str) -> dict:
    hidden, layers, heads, kv, ffn, vocabulary, tie, vision_ffn = QWEN2_5_VL[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tie,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocabulary,
    }


def derive(vision: str, llm: str, options: BuildOptions = EXACT) -> dict:
    return derive_config(vision_config(vision), llm_config(llm), VOCABULARY, options)


def count(config: dict) -> dict[str, int]:
    """Parameters of the full-size model, by part; no memory is taken."""
    with torch.device("meta"):
        model = VisionLanguageModel(parse_config(config))
    counts = {"vit": 0, "merger": 0, "decoder": 0}
    for name, parameter in model.named_parameters():
        part = "merger" if ".merger." in name else "vit" if ".visual." in name else "decoder"
        counts[part] += parameter.numel()
    return counts | {"all": sum(counts.values())}


def test_the_recipes_table_for_7b_and_8b():
    """With its two errata: 36 layers, where the recipe's text says 32, and out_hidden_size,
    which it leaves out."""
    config = derive("7B", "8B")
    table = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "max_window_layers": 36,
        "head_dim": 128,
    }
    assert {key: config["text_config"][key] for key in table} == table
    assert config["vision_config"]["out_hidden_size"] == 4096
    rope = config["text_config"]["rope_parameters"]
    assert rope == {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    assert config["image_token_id"] == 151655 and config["vision_end_token_id"] == 151653
    assert config["tie_word_embeddings"] is False


def test_what_the_recipes_text_says_is_an_option():
    cut = BuildOptions(variant="literal", llm_layers=32)
    text = derive("7B", "8B", cut)["text_config"]
    assert (text["num_hidden_layers"], text["max_window_layers"]) == (32, 32)


def test_parameters_of_7b_and_8b():
    counts = count(derive("7B", "8B"))
    assert round(counts["vit"] / 1e6, 2) == 631.98
    assert round(counts["merger"] / 1e6, 3) == 47.196
    assert round(counts["all"] / 1e9, 3) == 8.870


# Qwen3's own sizes: what its model cards give, to three digits.
DECODERS = {"0.6B": 0.596, "1.7B": 1.721, "4B": 4.022, "8B": 8.191, "14B": 14.768, "32B": 32.762}


@pytest.mark.parametrize("llm", QWEN3)
@pytest.mark.parametrize("vision", QWEN2_5_VL)
def test_every_size_on_every_size(vision, llm):
    config = derive(vision, llm)
    donor, built = llm_config(llm), parse_config(config)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "tie_word_embeddings"):
        assert getattr(built.text, key) == donor[key]
    assert (built.text.head_dim, built.text.mrope_section) == (128, (16, 24, 24))
    assert built.text.qk_norm and not built.text.qkv_bias
    assert built.vision.out_hidden_size == donor["hidden_size"]
    assert built.vision.intermediate_size == QWEN2_5_VL[vision][-1]
    assert config["tie_word_embeddings"] is donor["tie_word_embeddings"]
    counts = count(config)
    assert round(counts["decoder"] / 1e9, 3) == DECODERS[llm]
    assert counts["merger"] == 1280 + 5120**2 + 5120 + (5120 + 1) * donor["hidden_size"]


@pytest.mark.parametrize("llm", QWEN3)
def test_the_literal_variant_fits_where_heads_make_the_hidden_size(llm):
    if llm not in LITERAL_FITS:
        with pytest.raises(ConfigError, match="use --variant exact"):
            derive("7B", llm, LITERAL)
        return
    config = derive("7B", llm, LITERAL)
    built = parse_config(config)
    assert built.text.qkv_bias and not built.text.qk_norm
    assert "attention_bias" not in config["text_config"]
    assert built.text.tie_word_embeddings is QWEN3[llm][-1]

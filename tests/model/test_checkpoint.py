"""Checkpoints: strict, atomic, in the hub's layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import GOLDEN_MODEL, hybrid, hybrid_config, write_hybrid, write_llm_donor
from vlm.checkpoint import (
    CheckpointError,
    TensorReader,
    load_language_model,
    load_model,
    save_model,
)
from vlm.hf_config import ConfigError, parse_config, read_config


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 300_000])
def test_round_trip_key_for_key(tmp_path, tie, max_shard_bytes):
    model = hybrid(tie=tie)
    save_model(
        tmp_path / "m",
        model.state_dict().items(),
        GOLDEN_MODEL,
        hybrid_config(tie),
        max_shard_bytes,
    )
    shards = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**9)
    held = {key for shard in shards for key in load_file(shard)}
    assert held == set(model.state_dict()) and ("lm_head.weight" in held) is not tie
    assert (tmp_path / "m" / "tokenizer.json").exists()
    again = load_model(tmp_path / "m")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())
    assert load_model(tmp_path / "m", dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path):
    folder = write_hybrid(tmp_path / "m", seed=1)
    before = load_file(folder / "model.safetensors")

    def broken():
        yield "lm_head.weight", torch.zeros(3)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        save_model(folder, broken(), GOLDEN_MODEL, hybrid_config())
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.visual.merger.ln_q.weight"), "lacks 1 tensors: .*ln_q"),
        (lambda t: t.update(extra=torch.zeros(2)), "also holds 1 tensors: extra"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(5, 48)}),
            r"shape \[5, 48\].*\[4096, 48\]",
        ),
        (lambda t: t.update({"visual.merger.ln_q.weight": torch.zeros(64)}), "twice"),
    ],
)
def test_every_key_and_shape_must_fit(tmp_path, change, message):
    folder = write_hybrid(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_tied_head_that_was_written_out_is_accepted(tmp_path):
    folder = write_llm_donor(tmp_path / "llm", tie=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    model = load_language_model(folder)
    assert model.head_weight is model.model["language_model"].embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_vl"}, "qwen3_vl"),
        ({"image_token_id": None}, "no image_token_id"),
        ({"text_config": {"num_key_value_heads": 3}}, "share 3 key/value heads"),
        (
            {"text_config": {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [4, 6, 5]}}},
            "sums to 15",
        ),
        ({"text_config": {"use_sliding_window": True}}, "use_sliding_window"),
        ({"text_config": {"hidden_act": "gelu"}}, "gelu"),
        ({"vision_config": {"out_hidden_size": 64}}, "width 64.*width 48"),
        ({"vision_config": {"depth": None}}, "no depth"),
    ],
)
def test_configs_that_cannot_be_built_are_refused_by_name(change, message):
    raw = hybrid_config()
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        parse_config(raw, "dir/config.json")


def test_unreadable_json_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="holds a list"):
        read_config(tmp_path)


def test_reader_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        TensorReader(tmp_path)

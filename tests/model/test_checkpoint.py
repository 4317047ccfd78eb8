"""Checkpoints: strict, atomic, in the hub's layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
from vlm.model import VisionLanguageModel
from vlm.tensor_file import make_header


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
        # of another type
        ({"model_type": ["graft_vl"]}, "of model_type"),
        ({"text_config": "x"}, "text_config is 'x', not a JSON object"),
        ({"vision_config": None}, "no vision_config"),
        ({"vision_config": [1]}, r"vision_config is \[1\], not a JSON object"),
        ({"image_token_id": "4012"}, "image_token_id is '4012', not a whole number"),
        *(
            ({"text_config": {name: value}}, f"{name} is {value!r}, not ")
            for name, value in (
                ("num_attention_heads", 0),
                ("num_attention_heads", "4"),
                ("num_hidden_layers", "3"),
                ("num_hidden_layers", 3.0),
                ("num_hidden_layers", True),
                ("hidden_size", "48"),
                ("vocab_size", 4096.5),
                ("vocab_size", 10**20),
                ("head_dim", "x"),
                ("rms_norm_eps", None),
                ("rms_norm_eps", "1e-6"),
                ("rms_norm_eps", float("nan")),
                ("rope_parameters", "yarn"),
            )
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        # out of range, or not built
        ({"text_config": {"rope_parameters": {"rope_theta": -1}}}, "rope_theta is -1"),
        ({"text_config": {"rope_parameters": {"rope_theta": 10**400}}}, "too large"),
        ({"text_config": {"rope_parameters": {"rope_type": ["yarn"]}}}, "rope of type"),
        (
            {"text_config": {"rope_parameters": {"rope_theta": 1e6, "mrope_section": "abc"}}},
            "mrope_section is 'abc', not a list",
        ),
        (
            {"text_config": {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [8, 8]}}},
            r"mrope_section is \[8, 8\], not three",
        ),
        ({"text_config": {"layer_types": ["sliding_attention"] * 3}}, "layer_types"),
        ({"text_config": {"layer_types": 3}}, "layer_types"),
        ({"text_config": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"text_config": {"head_dim": 31}}, "head_dim 31 is odd"),
        ({"vision_config": {"num_heads": 5}}, "num_heads 5 does not divide"),
        ({"vision_config": {"num_heads": 0}}, "num_heads is 0, not"),
        ({"vision_config": {"window_size": 0}}, "window_size is 0, not"),
        ({"vision_config": {"window_size": 13}}, "window_size 13 holds no visual token"),
        ({"vision_config": {"fullatt_block_indexes": 3}}, "fullatt_block_indexes is 3, not a"),
        ({"vision_config": {"fullatt_block_indexes": [99]}}, "fullatt_block_indexes holds 99"),
        ({"vision_config": {"fullatt_block_indexes": ["1"]}}, "fullatt_block_indexes holds '1'"),
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
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config.json cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="holds a list"):
        read_config(tmp_path)


def test_reader_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        TensorReader(tmp_path)


def header(**rows):
    """The bytes of a file's header."""
    text = json.dumps(rows).encode()
    return len(text).to_bytes(8, "little") + text


def row(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = '{"a": %s, "a": %s}' % ((json.dumps(row("F32", [1], 0, 4)),) * 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged \\(0 bytes and no safetensors header"),
        (b"<html>not found</html>", "damaged .*no safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (
            header(a=row("F32", [2], 0, 8)) + b"1234567",
            "truncated: it has 76 .* says 77",
        ),
        (
            header(a=row("F32", [2], 0, 8)) + b"123456789",
            "damaged: it has 78 .* says 77",
        ),
        (header(a=row("F32", [3], 0, 8)) + bytes(8), r"F32 \[3\] in 8 bytes"),
        (header(a=row("F32", [-2], 0, 8)) + bytes(8), "shape"),
        (header(a=row("F32", [1], 0, 4), b=row("F32", [1], 2, 6)) + bytes(8), "two tensors or to"),
        (header(a=row("F32", [1], 4, 8)) + bytes(8), "two tensors or to none"),
        (header(a={"dtype": "F32"}) + bytes(8), "makes no sense"),
        (header(a=[1]) + bytes(8), "makes no sense"),
        (len(TWICE).to_bytes(8, "little") + TWICE.encode() + bytes(4), "a is there twice"),
        ((5).to_bytes(8, "little") + b"{nope", "makes no sense"),
        ((2).to_bytes(8, "little") + b"[]", "makes no sense"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "makes no sense"),
    ],
)
def test_damaged_weights_are_named_before_any_is_read(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors is .*{message}"):
        TensorReader(tmp_path)


def test_a_dtype_that_torch_lacks_is_a_quantised_models(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(header(a=row("F4", [16], 0, 8)) + bytes(8))
    with pytest.raises(CheckpointError, match=r"model.safetensors holds a as F4, as quantised"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[" * 100_000, "no sensible weight_map"),
        ("{", "no sensible weight_map"),
        ("[]", "no sensible weight_map"),
        ("{}", "no sensible weight_map"),
        ('{"weight_map": {"a": 1}}', "no sensible weight_map"),
        ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "a is there twice"),
        ('{"weight_map": {"a": "../one.safetensors"}}', r"names \.\./one.safetensors, which is no"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names /etc/passwd, which is no file beside it"),
        ('{"weight_map": {"a": "two.safetensors"}}', "two.safetensors is missing"),
        ('{"weight_map": {"b": "one.safetensors"}}', "says that one.safetensors holds b; it does"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, index, message):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        TensorReader(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for file in ("one", "two"):
        save_file({"a": torch.zeros(2), file: torch.zeros(2)}, tmp_path / f"{file}.safetensors")
    weight_map = {"a": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"a twice .one.safetensors and two.safetensors"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_quantised_weights_are_refused(tmp_path, dtype):
    folder = write_hybrid(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} as (I8|U8|F8_E4M3|I32), as quantised"):
        load_model(folder)


LOAD = """
import resource, sys
import torch
from vlm.checkpoint import load_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[1], torch.bfloat16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_loading_takes_one_model_of_memory(tmp_path):
    config = hybrid_config(tie=False)
    config["text_config"] |= {"vocab_size": 10**6, "num_hidden_layers": 1}
    with torch.device("meta"):
        shapes = VisionLanguageModel(parse_config(config)).state_dict()
    header = make_header([(name, "BF16", tensor.shape) for name, tensor in shapes.items()])
    size = 2 * sum(tensor.numel() for tensor in shapes.values())
    assert size > 190e6
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (tmp_path / "model.safetensors").open("wb") as file:  # a hole
        file.write(header)
        file.truncate(len(header) + size)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LOAD, tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # building on the meta device loads code of torch's own
    assert int(result.stdout) * 1024 < size + 130e6

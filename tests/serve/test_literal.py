"""The literal graft's export: a plain qwen2_5_vl that stock code loads and computes as we do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from serve import parity
from serve.chat import main as chat
from serve.export import main as export
from serve.export_files import LITERAL
from serve.limits import read_limits
from serve.parity_requests import built_in_requests
from serve.preflight import check_model
from serve.source import limits_of
from serve.witness import hf_logits, our_logits
from tests.tiny import randomise, write_llm_donor, write_vision_donor
from vlm.checkpoint import load_model, save_model
from vlm.data.processor import Processor
from vlm.graft.options import BuildOptions
from vlm.graft.stream import build

ROOT = Path(__file__).parents[2]


def make_export(folder: Path, tie: bool) -> tuple[Path, Path]:
    """(checkpoint, export) of a literal graft whose biases training has moved."""
    vision = write_vision_donor(folder / "vl")
    llm = write_llm_donor(folder / "llm", tie=tie, hidden_size=128)
    build(vision, llm, folder / "graft", BuildOptions(variant="literal"))
    model = load_model(folder / "graft")
    randomise(model, seed=5)
    save_model(folder / "trained", model.state_dict().items(), folder / "graft")
    flags = ["--max_pixels", "200704", "--fps_max_frames", "8"]
    assert export([str(folder / "trained"), "--out", str(folder / "export"), *flags]) == 0
    return folder / "trained", folder / "export"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("literal"), request.param)


def test_it_is_laid_out_as_the_hubs_own(pair):
    _, exported = pair
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl" and "auto_map" not in config
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert not list(exported.glob("*.py")) and (exported / LITERAL).exists()
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    heads = {name.split(".")[0] + "." + name.split(".")[1] for name in names}
    known = {"visual.patch_embed", "visual.blocks", "visual.merger"}
    known |= {"model.embed_tokens", "model.layers", "model.norm", "lm_head.weight"}
    assert heads <= known and "model.layers.0.self_attn.q_proj.bias" in names
    card = (exported / "README.md").read_text()
    assert "trust_remote_code" not in card and "no QK-norm, biases on q, k and v" in card
    assert "vllm serve" in card


def test_stock_transformers_finds_every_key_and_computes_our_logits(pair):
    source, exported = pair
    stock, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        exported, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    limits = read_limits(exported)
    processor = Processor.from_pretrained(source, limits)
    ours = load_model(source).eval()
    kinds = ("text", "image resized", "very wide", "three interleaved", "several turns")
    samples = [sample for sample in built_in_requests() if sample.id in kinds]
    for sample in samples:
        example = processor.prompt(sample)
        expected = our_logits(ours, example)
        found = hf_logits(stock.eval(), example, ours.config)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), sample.id
    assert type(AutoProcessor.from_pretrained(exported)).__name__ == "Qwen2_5_VLProcessor"


def test_parity_with_stock_transformers_says_what_it_does_not_judge(pair, capsys):
    _, exported = pair
    assert parity.main([str(exported), "--engines", "transformers"]) == 0
    out = capsys.readouterr().out
    (noted,) = (line for line in out.splitlines() if parity.STOCK_POSITIONS in line)
    assert noted.startswith("video ")
    assert f"all {len(built_in_requests()) - out.count(parity.STOCK_POSITIONS)} comparisons" in out


def test_a_difference_of_anything_else_is_still_one():
    row = parity.Row("v", "transformers", True, True, 0.0, False, 9.0, 0, 16, passed=False)
    assert parity.forgive_positions(row).passed
    for broken in ({"ids": False}, {"grids": False}, {"pixels": 0.1}):
        assert not parity.forgive_positions(parity.replace(row, **broken)).passed
    same_places = parity.replace(row, positions=True)
    assert not parity.forgive_positions(same_places).passed


def test_it_carries_its_limits_and_can_be_served_and_chatted_with(pair, capsys):
    _, exported = pair
    assert limits_of(exported)["max_pixels"] == 200704
    assert limits_of(exported)["fps_max_frames"] == 8
    assert not check_model(exported).text.qk_norm
    assert chat([str(exported), "--prompt", "Hi", "--max_new_tokens", "3"]) == 0


def test_it_has_one_format_and_can_be_exported_again(pair, tmp_path, capsys):
    source, exported = pair
    flags = ["--out", str(tmp_path / "out"), "--format", "vllm_stock"]
    assert export([str(source), *flags]) == 2
    assert "leave --format vllm_stock out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert export([str(exported), "--out", str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    assert limits_of(tmp_path / "b") == limits_of(exported)


@pytest.mark.slow
def test_stock_vllm_answers_as_we_do(tmp_path):
    """With plugins off: the class is vLLM's own."""
    _, exported = make_export(tmp_path, tie=False)
    rows = tmp_path / "rows.json"
    result = subprocess.run(
        [sys.executable, "serve/parity.py", exported, "--engines", "vllm", "--json", rows],
        cwd=ROOT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(rows.read_text())
    assert len(found) == len(built_in_requests()) and all(row["passed"] for row in found)
    assert all(not row["note"] for row in found)

"""The surgery on tiny donors: every tensor's fate, and the files beside the weights."""

import json

import pytest
import torch

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import TensorReader, load_model
from vlm.graft.__main__ import main
from vlm.graft.stream import build
from vlm.hf_config import read_json


@pytest.fixture
def donors(tmp_path):
    return write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm")


def test_every_tensor_is_copied_or_fresh(donors, tmp_path):
    report = build(*donors, tmp_path / "hybrid")
    vision, llm = (TensorReader(donor) for donor in donors)
    hybrid = TensorReader(tmp_path / "hybrid")
    fates = {(row["name"], row["donor"]): row["action"] for row in report["tensors"]}
    for name in hybrid.names():
        if name.startswith("model.visual.merger."):
            assert fates[name, None] == "initialised"
        elif name.startswith("model.visual."):
            assert fates[name, "vision"] == "copied"
            assert torch.equal(hybrid.get(name), vision.get(name))
        else:
            assert fates[name, "llm"] == "copied"
            assert torch.equal(hybrid.get(name), llm.get(name))
    dropped = {name for (name, _), action in fates.items() if action == "dropped"}
    assert "model.language_model.layers.0.self_attn.q_proj.bias" in dropped
    assert any("q_norm" in name for name in hybrid.names())
    accounted = {name for name, donor in fates if donor == "vision"}
    assert accounted == set(vision.names())
    assert json.loads((tmp_path / "hybrid" / "graft_report.json").read_text()) == report


@pytest.mark.parametrize("tie", [True, False])
def test_tie_flag_is_the_llm_donors_at_both_levels(tmp_path, tie):
    vision = write_vision_donor(tmp_path / "vl", tie=not tie)
    llm = write_llm_donor(tmp_path / "llm", tie=tie)
    build(vision, llm, tmp_path / "hybrid")
    config = read_json(tmp_path / "hybrid" / "config.json")
    assert config["tie_word_embeddings"] is tie
    assert config["text_config"]["tie_word_embeddings"] is tie
    assert ("lm_head.weight" in TensorReader(tmp_path / "hybrid").names()) is not tie
    model = load_model(tmp_path / "hybrid")
    assert (model.head_weight is model.language_model.embed_tokens.weight) is tie


def test_companions_are_the_llms_tokenizer_and_the_vision_donors_template(donors, tmp_path):
    vision, llm = donors
    (vision / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    build(vision, llm, tmp_path / "hybrid")
    hybrid = tmp_path / "hybrid"
    assert "<think>" in (hybrid / "tokenizer.json").read_text()
    template = (vision / "chat_template.jinja").read_text()
    assert (hybrid / "chat_template.jinja").read_text() == template
    settings = read_json(hybrid / "preprocessor_config.json")
    assert settings == read_json(vision / "preprocessor_config.json")
    assert read_json(hybrid / "generation_config.json") == {
        "eos_token_id": [4002, 4000],
        "pad_token_id": 4000,
    }


@pytest.mark.parametrize("tie", [True, False])
def test_new_tokens_of_the_vision_donor_grow_the_embedding(tmp_path, tie):
    vision = write_vision_donor(tmp_path / "vl")
    llm = write_llm_donor(tmp_path / "small", vocab_size=4026, tie=tie)
    tokenizer = read_json(llm / "tokenizer.json")
    for content, index in (("<|extra|>", 4026), ("<|extra2|>", 4027)):
        row = tokenizer["added_tokens"][-1] | {"content": content, "id": index}
        tokenizer["added_tokens"].append(row)
    (vision / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = build(vision, llm, tmp_path / "hybrid")
    rows = [row for row in report["tensors"] if row["action"] == "resized"]
    assert report["tokenizer"]["donor"] == "vision"
    assert [row["shape"] for row in rows] == [[4028, 48]] * (1 if tie else 2)
    hybrid, donor = TensorReader(tmp_path / "hybrid"), TensorReader(llm)
    for row in rows:
        assert (row["fill"], row["added_rows"]) == ("normal", 2)
        assert torch.equal(hybrid.get(row["name"])[:4026], donor.get(row["name"]))
        new = hybrid.get(row["name"])[4026:]
        assert 0 < new.abs().max() < 0.1
        assert new.std(correction=0).item() == pytest.approx(row["std"], rel=1e-5)
    assert main(["verify", "--model", str(tmp_path / "hybrid"), "--llm", str(llm)]) == 0

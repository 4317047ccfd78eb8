"""The surgery on tiny donors in every layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import CheckpointError, TensorReader, load_model
from vlm.graft.__main__ import main
from vlm.graft.plan import derive_config, scale_mrope_section
from vlm.graft.stream import build
from vlm.hf_config import ConfigError, read_config, read_json

LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.fixture
def donors(tmp_path):
    return write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm")


@pytest.mark.parametrize(("nested", "new_keys"), LAYOUTS)
def test_every_layout_of_both_donors_gives_the_same_hybrid(donors, tmp_path, nested, new_keys):
    build(*donors, tmp_path / "hybrid")
    vision = write_vision_donor(tmp_path / "vl2", nested, new_keys)
    llm = write_llm_donor(tmp_path / "llm2", nested, new_keys)
    build(vision, llm, tmp_path / "hybrid2")
    one, two = TensorReader(tmp_path / "hybrid"), TensorReader(tmp_path / "hybrid2")
    assert one.names() == two.names()
    assert all(torch.equal(one.get(name), two.get(name)) for name in one.names())
    assert read_config(tmp_path / "hybrid") == read_config(tmp_path / "hybrid2")


def test_every_tensor_is_copied_or_fresh(donors, tmp_path):
    report = build(*donors, tmp_path / "hybrid", seed=3)
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


def test_fresh_merger_has_the_initialiser_statistics_and_obeys_its_seed(donors, tmp_path):
    for number, seed in enumerate((5, 5, 6)):
        build(*donors, tmp_path / str(number), seed=seed)
    same, again, other = (
        load_file(tmp_path / str(number) / "model.safetensors") for number in range(3)
    )
    merger = "model.visual.merger.mlp.0.weight"
    assert torch.equal(same[merger], again[merger])
    assert not torch.equal(same[merger], other[merger])
    assert same[merger].std().item() == pytest.approx(0.02, rel=0.05)
    assert same[merger].mean().item() == pytest.approx(0.0, abs=5e-4)
    assert same["model.visual.merger.mlp.0.bias"].abs().max() == 0
    assert (same["model.visual.merger.ln_q.weight"] == 1).all()


@pytest.mark.parametrize("tie", [True, False])
def test_tie_flag_is_the_llm_donors_at_both_levels(tmp_path, tie):
    vision = write_vision_donor(tmp_path / "vl")
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


def test_recipe_table_for_7b_and_8b():
    """The recipe's table, with its two errata (36 layers; the merger's output is 4096 wide)."""
    vision = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "vocab_size": 152064,
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "in_chans": 3,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }
    llm = {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "max_window_layers": 36,
        "head_dim": 128,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
    }
    config = derive_config(vision, llm, llm["vocab_size"])
    text = config["text_config"]
    table = {key: llm[key] for key in llm if key not in ("model_type", "rope_theta")}
    assert {key: text[key] for key in table} == table
    assert config["vision_config"]["out_hidden_size"] == 4096
    assert text["rope_parameters"]["mrope_section"] == [16, 24, 24]
    assert config["image_token_id"] == 151655


def test_mrope_section_scales_or_is_refused():
    assert scale_mrope_section((16, 24, 24), 64) == [8, 12, 12]
    with pytest.raises(CheckpointError, match=r"\[16, 24, 24\].*64.*20"):
        scale_mrope_section((16, 24, 24), 40)


def test_new_tokens_of_the_vision_donor_grow_the_embedding(donors, tmp_path):
    vision = donors[0]
    llm = write_llm_donor(tmp_path / "small", vocab_size=4026)
    tokenizer = read_json(llm / "tokenizer.json")
    for content, index in (("<|extra|>", 4026), ("<|extra2|>", 4027)):
        row = tokenizer["added_tokens"][-1] | {"content": content, "id": index}
        tokenizer["added_tokens"].append(row)
    (vision / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = build(vision, llm, tmp_path / "hybrid")
    rows = [row for row in report["tensors"] if row["action"] == "resized"]
    assert report["tokenizer"]["donor"] == "vision"
    assert [row["shape"] for row in rows] == [[4028, 48]]
    hybrid, donor = TensorReader(tmp_path / "hybrid"), TensorReader(llm)
    name = rows[0]["name"]
    assert torch.equal(hybrid.get(name)[:4026], donor.get(name))
    assert main(["verify", "--model", str(tmp_path / "hybrid"), "--llm", str(llm)]) == 0


def test_clashing_tokenizers_are_refused_with_the_ids(donors, tmp_path, capsys):
    vision, llm = donors
    path = llm / "tokenizer.json"
    path.write_text(path.read_text().replace("<|vision_start|>", "<|other|>"))
    code = main(
        ["build", "--vision", str(vision), "--llm", str(llm), "--out", str(tmp_path / "hybrid")]
    )
    message = capsys.readouterr().err
    assert code == 2
    assert "4009" in message and "<|vision_start|>" in message and "<|other|>" in message
    assert not (tmp_path / "hybrid").exists()


def _add_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.mystery"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")


def _drop_norm(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _reshape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(47)
    save_file(tensors, folder / "model.safetensors")


def _edit_config(**changes):
    def edit(folder):
        config = read_json(folder / "config.json") | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_add_tensor, "mystery.*no place"),
        (_drop_norm, "lacks .*layers.1.self_attn.q_norm"),
        (_truncate, "damaged"),
        (_reshape, r"norm.weight has shape \[47\]"),
        (_edit_config(model_type="qwen3_moe"), "qwen3_moe"),
        (_edit_config(quantization_config={"bits": 4}), "quantised"),
        (_edit_config(rope_scaling={"type": "yarn"}), "yarn"),
        (_edit_config(attention_bias=True), "attention_bias"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    ],
)
def test_bad_donor_is_one_sentence_and_nothing_is_written(donors, tmp_path, damage, message):
    vision, llm = donors
    damage(llm)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        build(vision, llm, tmp_path / "hybrid")
    assert not list(tmp_path.glob("hybrid*"))


def test_missing_shard_and_lying_index_are_named(donors, tmp_path):
    vision, llm = donors
    shards = sorted(vision.glob("model-*.safetensors"))
    assert len(shards) > 1
    path = vision / "model.safetensors.index.json"
    honest = path.read_text()
    index = json.loads(honest)
    index["weight_map"]["visual.blocks.9.norm1.weight"] = shards[0].name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"holds visual.blocks.9.norm1.weight; it does not"):
        build(vision, llm, tmp_path / "hybrid")
    path.write_text(honest)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} is missing"):
        build(vision, llm, tmp_path / "hybrid")


def test_existing_output_and_swapped_donors_are_refused(donors, tmp_path):
    vision, llm = donors
    with pytest.raises(ConfigError, match="not a vision-language model"):
        build(llm, vision, tmp_path / "hybrid")
    (tmp_path / "hybrid").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        build(vision, llm, tmp_path / "hybrid")

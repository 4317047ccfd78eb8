"""A bad pair of donors: one sentence, exit code 2, and nothing is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.graft.__main__ import main
from vlm.graft.plan import scale_mrope_section
from vlm.hf_config import ConfigError, read_json


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    return write_vision_donor(folder / "vl"), write_llm_donor(folder / "llm")


@pytest.fixture
def donors(sound, tmp_path):
    """Copies that a test may damage, by name."""
    pair = {"vision": tmp_path / "vl", "llm": tmp_path / "llm"}
    for source, copy in zip(sound, pair.values(), strict=True):
        shutil.copytree(source, copy)
    return pair


def refusal(donors, out, capsys) -> str:
    """The sentence with which `build` refuses."""
    before = sorted(out.parent.rglob("*"))
    pair = ("--vision", str(donors["vision"]), "--llm", str(donors["llm"]))
    code = main(["build", *pair, "--out", str(out)])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert not captured.out and len(captured.err.splitlines()) == 1, captured
    assert sorted(out.parent.rglob("*")) == before
    return captured.err


def edit_config(**changes):
    def edit(folder):
        config = read_json(folder / "config.json") | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change):
    """Applied to the file that holds the last tensors, since the vision donor has several."""

    def edit(folder):
        path = max(folder.glob("*.safetensors"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def truncate(folder):
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def torn_header(folder):
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:40])


def lose_shard(folder):
    max(folder.glob("model-*.safetensors")).unlink()


def lying_index(folder):
    path = folder / "model.safetensors.index.json"
    index = read_json(path)
    file = max(index["weight_map"].values())
    index["weight_map"]["visual.blocks.9.norm1.weight"] = file
    path.write_text(json.dumps(index))


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def remove(name):
    return lambda folder: (folder / name).unlink()


def text(name, values):
    return edit_tensors(lambda tensors: tensors.update({name: values}))


Q_NORM = "model.layers.1.self_attn.q_norm.weight"
EMBED = "model.embed_tokens.weight"


def shorter(name):
    return lambda tensors: tensors.update({name: tensors[name][:4090].clone()})


EXTRA_LAYER = edit_tensors(
    lambda t: t.update({n.replace("layers.2.", "layers.3."): t[n].clone() for n in list(t)})
)
FEWER_LAYERS = edit_tensors(lambda t: [t.pop(n) for n in list(t) if "layers.2." in n])

CASES = [
    # not such models
    ("llm", edit_config(model_type="qwen3_moe"), "mixture of experts; --llm takes a dense Qwen3"),
    ("llm", edit_config(model_type="qwen2"), "Qwen2 or Qwen2.5, which has no QK-norm"),
    ("llm", edit_config(model_type="llama"), "of model_type 'llama'; --llm takes a dense Qwen3"),
    ("llm", edit_config(model_type=None), "of model_type None"),
    ("llm", edit_config(model_type=["qwen3"]), "of model_type ['qwen3']"),
    ("vision", edit_config(model_type="qwen3_vl"), "is a Qwen3-VL"),
    ("vision", edit_config(model_type="qwen3_vl_moe"), "is a Qwen3-VL with a mixture of experts"),
    ("vision", edit_config(model_type="qwen2_vl"), "is a Qwen2-VL"),
    ("vision", edit_config(model_type="llava"), "of model_type 'llava'; --vision takes a Qwen2.5"),
    ("llm", edit_config(quantization_config={"bits": 4}), "quantised"),
    ("vision", edit_config(quantization_config={"bits": 4}), "quantised"),
    # configs that are not built
    ("llm", edit_config(rope_scaling={"type": "yarn"}), "yarn"),
    ("llm", edit_config(attention_bias=True), "attention_bias"),
    ("llm", edit_config(num_key_value_heads=3), "4 attention heads cannot share 3"),
    ("llm", edit_config(hidden_size=None), "no hidden_size"),
    ("vision", edit_config(vision_config={"depth": 4}), "no hidden_size"),
    ("vision", edit_config(image_token_id=None), "no image_token_id"),
    ("vision", edit_config(rope_scaling=None), "no mrope_section"),
    # files that do not fit the config
    ("llm", text("model.norm.weight", torch.ones(47)), "norm.weight has shape [47]"),
    ("llm", edit_config(intermediate_size=95), "the hybrid needs [95, 48]"),
    ("llm", EXTRA_LAYER, "says 3 layers and the files hold 4 (0-3)"),
    ("llm", FEWER_LAYERS, "says 3 layers and the files hold 2 (0-1)"),
    ("llm", edit_config(num_hidden_layers=2), "says 2 layers and the files hold 3 (0-2)"),
    ("llm", edit_tensors(lambda t: t.pop(Q_NORM)), "lacks model.language_model.layers.1.self_attn"),
    ("llm", text("model.layers.0.mystery", torch.zeros(3)), "mystery, which has no place"),
    ("vision", text("visual.mystery", torch.zeros(3)), "mystery, which has no place"),
    ("llm", edit_tensors(lambda t: t.pop(EMBED)), "lacks model.language_model.embed_tokens"),
    ("llm", edit_tensors(shorter(EMBED)), "has shape [4090, 48], but vocab_size of config.json"),
    ("llm", text("lm_head.weight", torch.ones(4090, 48)), "lm_head.weight has shape [4090, 48]"),
    ("llm", text("model.layers.abc.x", torch.zeros(3)), "abc.x, which has no place"),
    ("llm", text("model.layers.x", torch.zeros(3)), "layers.x, which has no place"),
    ("vision", text("visual.blocks.abc.x", torch.zeros(3)), "abc.x, which has no place"),
    ("llm", text(Q_NORM, torch.ones(32, dtype=torch.int8)), f"{Q_NORM[13:]} as I8"),
    ("llm", text(Q_NORM, torch.ones(32).to(torch.float8_e4m3fn)), "as F8_E4M3, as quantised"),
    ("llm", text(Q_NORM, torch.ones(32, dtype=torch.float64)), "as F64"),
    # damaged files
    ("llm", truncate, "model.safetensors"),
    ("llm", torn_header, "model.safetensors"),
    ("vision", truncate, "safetensors"),
    ("vision", lose_shard, "missing"),
    ("vision", lying_index, "holds visual.blocks.9.norm1.weight; it does not"),
    ("vision", broken_index, "weight_map"),
    ("llm", remove("model.safetensors"), "neither"),
    ("llm", remove("config.json"), "config.json does not exist"),
    ("llm", lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    ("llm", remove("tokenizer.json"), "tokenizer.json does not exist"),
    ("vision", remove("tokenizer.json"), "tokenizer.json does not exist"),
    ("vision", remove("chat_template.jinja"), "has no chat template"),
    ("vision", lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "cannot be read: 'utf"),
    ("vision", remove("preprocessor_config.json"), "has neither preprocessor_config.json nor"),
]


@pytest.mark.parametrize(("donor", "damage", "words"), CASES)
def test_bad_donor(donors, tmp_path, capsys, donor, damage, words):
    damage(donors[donor])
    message = refusal(donors, tmp_path / "hybrid", capsys)
    assert words in message and str(donors[donor].name) in message


def test_swapped_donors(donors, tmp_path, capsys):
    swapped = {"vision": donors["llm"], "llm": donors["vision"]}
    message = refusal(swapped, tmp_path / "hybrid", capsys)
    assert "--vision and --llm are swapped" in message


def test_the_same_donor_twice(donors, tmp_path, capsys):
    twice = {"vision": donors["vision"], "llm": donors["vision"]}
    message = refusal(twice, tmp_path / "hybrid", capsys)
    assert "model_type 'qwen2_5_vl'; --llm takes a dense Qwen3" in message


def test_output_that_exists(donors, tmp_path, capsys):
    (tmp_path / "hybrid").mkdir()
    assert "hybrid exists" in refusal(donors, tmp_path / "hybrid", capsys)


def test_clashing_tokenizers_are_refused_with_the_ids(donors, tmp_path, capsys):
    path = donors["llm"] / "tokenizer.json"
    path.write_text(path.read_text().replace("<|vision_start|>", "<|other|>"))
    message = refusal(donors, tmp_path / "hybrid", capsys)
    assert "4009" in message and "<|vision_start|>" in message and "<|other|>" in message


def test_mrope_section_scales_or_is_refused():
    assert scale_mrope_section((16, 24, 24), 64) == [8, 12, 12]
    with pytest.raises(ConfigError, match=r"\[16, 24, 24\].*64.*20"):
        scale_mrope_section((16, 24, 24), 40)

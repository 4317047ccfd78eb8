"""Every layout, tying, variant and option on tiny donors."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import TensorReader, load_language_model, load_model
from vlm.graft.__main__ import main
from vlm.graft.options import BuildOptions
from vlm.graft.proof_text import text_batch
from vlm.graft.stream import build
from vlm.hf_config import ConfigError, read_config, read_json

LAYOUTS = list(itertools.product([False, True], repeat=2))
"""(nested config, new keys)."""
TIES = list(itertools.product([False, True], repeat=2))
"""(the vision donor's head, the language donor's)."""
LITERAL = BuildOptions(variant="literal")


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """Donors by kind and layout, each written once."""
    made = {}

    def write(kind, *how, **more):
        key = (kind, how, tuple(sorted(more.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind) / "donor"
            writer = {"vision": write_vision_donor, "llm": write_llm_donor}[kind]
            made[key] = writer(folder, *how, **more)
        return made[key]

    return write


def contents(folder):
    reader = TensorReader(folder)
    return {name: reader.get(name) for name in reader.names()}


@pytest.fixture(scope="module")
def reference(donor, tmp_path_factory):
    """(config, tensors) of the hybrid of donors as the hub has them."""
    made = {}

    def make(variant, ties):
        if (variant, ties) not in made:
            folder = tmp_path_factory.mktemp("reference") / "hybrid"
            pair = donor("vision", tie=ties[0]), donor("llm", tie=ties[1], hidden_size=128)
            build(*pair, folder, BuildOptions(variant=variant))
            made[variant, ties] = read_config(folder), contents(folder)
        return made[variant, ties]

    return make


@pytest.mark.parametrize("variant", ["exact", "literal"])
@pytest.mark.parametrize("ties", TIES, ids=str)
@pytest.mark.parametrize(
    ("of_vision", "of_llm"), list(itertools.product(LAYOUTS, LAYOUTS)), ids=str
)
def test_layouts_change_nothing(donor, reference, tmp_path, variant, ties, of_vision, of_llm):
    vision = donor("vision", *of_vision, tie=ties[0])
    llm = donor("llm", *of_llm, tie=ties[1], hidden_size=128)
    build(vision, llm, tmp_path / "hybrid", BuildOptions(variant=variant))
    config, tensors = reference(variant, ties)
    assert read_config(tmp_path / "hybrid") == config
    assert config.text.tie_word_embeddings is ties[1]
    assert config.text.qk_norm is (variant == "exact")
    found = contents(tmp_path / "hybrid")
    assert found.keys() == tensors.keys()
    assert ("lm_head.weight" in found) is not ties[1]
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def text_logits(folder, text_of):
    """Logits of a hybrid and of our decoder on its language donor, on the same words."""
    model, donor = load_model(folder), load_language_model(text_of)
    generator = torch.Generator().manual_seed(3)
    batch = text_batch([torch.randint(0, 4000, (40,), generator=generator)], model.config)
    with torch.inference_mode():
        hybrid = F.linear(model(batch), model.head_weight)
        hidden = donor(batch.input_ids, batch.segments, batch.target_rows)
        return hybrid, F.linear(hidden, donor.head_weight)


def test_literal_drops_qk_norm_adds_zero_biases_and_copies_the_rest(donor, tmp_path):
    vision, llm = donor("vision"), donor("llm", hidden_size=128)
    report = build(vision, llm, tmp_path / "hybrid", LITERAL)
    raw = read_json(tmp_path / "hybrid" / "config.json")
    assert raw["model_type"] == "qwen2_5_vl"
    assert raw["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert raw["text_config"]["model_type"] == "qwen2_5_vl_text"
    assert raw["text_config"]["num_hidden_layers"] == 3
    found, source = contents(tmp_path / "hybrid"), contents(llm)
    biases = [name for name in found if name.endswith(("q_proj.bias", "k_proj.bias"))]
    biases += [name for name in found if "language_model" in name and name.endswith("v_proj.bias")]
    assert len(biases) == 9 and not any(found[name].any() for name in biases)
    lost = {name for name in source if "_norm.weight" in name and "self_attn" in name}
    assert len(lost) == 6 and not lost & found.keys()
    assert all(torch.equal(found[name], source[name]) for name in source.keys() - lost)
    dropped = {r["name"] for r in report["tensors"] if r["action"] == "dropped"}
    assert lost <= dropped
    hybrid, reference = text_logits(tmp_path / "hybrid", llm)
    assert (hybrid - reference).abs().max() > 0.1


def test_literal_is_refused_where_heads_do_not_make_the_hidden_size(donor, tmp_path, capsys):
    code = main(
        [
            *("build", "--vision", str(donor("vision")), "--llm", str(donor("llm"))),
            *("--out", str(tmp_path / "hybrid"), "--variant", "literal"),
        ]
    )
    assert code == 2
    assert (
        "4 heads of 32 are not the hidden size 48; use --variant exact" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["exact", "literal"])
def test_llm_layers_keeps_the_first_and_says_so(donor, tmp_path, variant):
    vision, llm = donor("vision"), donor("llm", hidden_size=128)
    options = BuildOptions(variant=variant, llm_layers=2)
    report = build(vision, llm, tmp_path / "hybrid", options)
    text = read_json(tmp_path / "hybrid" / "config.json")["text_config"]
    assert (text["num_hidden_layers"], text["max_window_layers"]) == (2, 2)
    assert len(text["layer_types"]) == 2
    load_model(tmp_path / "hybrid")
    rows = [r for r in report["tensors"] if ".layers.2." in r["name"] and r["donor"] == "llm"]
    assert len(rows) == 11 and {r["action"] for r in rows} == {"dropped"}
    assert all("--llm_layers" in r["reason"] for r in rows)
    assert any("1 of them" in loss for loss in report["losses"])
    first = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(contents(tmp_path / "hybrid")[first], contents(llm)[first])


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_layers_that_are_not_there(donor, tmp_path, layers):
    message = "the language donor has 3 layers" if layers > 0 else "give 1 or more"
    with pytest.raises(ConfigError, match=f"--llm_layers {layers}: {message}"):
        build(donor("vision"), donor("llm"), tmp_path / "out", BuildOptions(llm_layers=layers))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_dtype_converts_every_tensor(donor, tmp_path, name):
    build(donor("vision"), donor("llm"), tmp_path / "hybrid", BuildOptions(dtype=name))
    found, source = contents(tmp_path / "hybrid"), contents(donor("llm"))
    dtype = getattr(torch, name)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    same = [n for n in source if n in found]
    assert same and all(torch.equal(found[n], source[n].to(dtype)) for n in same)
    assert read_json(tmp_path / "hybrid" / "config.json")["dtype"] == name


@pytest.mark.parametrize(
    ("size", "files"), [("4GB", 1), ("0.4MB", 2), ("400 kb", 2)], ids=["one", "MB", "kb"]
)
def test_shard_sizes(donor, tmp_path, size, files):
    out = tmp_path / "hybrid"
    arguments = ["--vision", str(donor("vision")), "--llm", str(donor("llm")), "--out", str(out)]
    assert main(["build", *arguments, "--max_shard_size", size]) == 0
    found = list(out.glob("*.safetensors"))
    assert len(found) == files if files == 1 else len(found) >= files
    load_model(out)


@pytest.mark.parametrize("size", ["4", "big", "0GB", "-1GB", "4GiB", ""])
def test_a_shard_size_that_is_none(donor, tmp_path, capsys, size):
    arguments = ["--vision", str(donor("vision")), "--llm", str(donor("llm"))]
    arguments += ["--out", str(tmp_path / "out"), f"--max_shard_size={size}"]
    assert main(["build", *arguments]) == 2
    error = capsys.readouterr().err
    assert "give one such as 4GB or 500MB" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_report_is_what_was_printed_and_written(donor, tmp_path, capsys):
    arguments = ["--vision", str(donor("vision")), "--llm", str(donor("llm", hidden_size=128))]
    code = main(["build", *arguments, "--out", str(tmp_path / "out"), "--variant", "literal"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "graft_report.json").read_text())
    assert code == 0 and report["options"]["variant"] == "literal"
    assert all(loss in printed for loss in report["losses"]) and "QK-norm" in printed

"""Every tensor, token and dtype of a graft is looked at; what was not is told."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import TensorReader
from vlm.graft.__main__ import main
from vlm.graft.options import BuildOptions
from vlm.graft.stream import build
from vlm.graft.verify import verify

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
NORM = "model.language_model.layers.1.input_layernorm.weight"
MERGER = "model.visual.merger.mlp.2.weight"
UP = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Hybrids by their options, each made once: (hybrid, language donor, vision donor).

    Their embedding has 16 rows that the language donor has not.
    """
    root = tmp_path_factory.mktemp("made")
    vision = write_vision_donor(root / "vl")
    llm = write_llm_donor(root / "llm", tie=False, vocab_size=4010)
    done = {}

    def make(**options):
        key = tuple(options.items())
        if key not in done:
            done[key] = root / f"hybrid{len(done)}"
            build(vision, llm, done[key], BuildOptions(**options))
        return done[key], llm, vision

    return make


@pytest.fixture
def grafted(made, tmp_path):
    hybrid, llm, vision = made(seed=5)
    return shutil.copytree(hybrid, tmp_path / "hybrid"), llm, vision


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def named(proof):
    return {difference.name for difference in proof.differences}


def test_one_damaged_value_is_found_in_any_tensor(grafted):
    hybrid = grafted[0]
    assert verify(*grafted).holds
    reader = TensorReader(hybrid)
    names = reader.names()
    assert {EMBEDDING, HEAD, MERGER} < set(names) and len(names) > 80
    for name in names:
        stored = reader.stored(name)
        last = stored.offset + stored.nbytes - 4  # of a grown tensor in an added row
        with open(stored.path, "r+b") as file:
            file.seek(last)
            own = file.read(4)
            file.seek(last)
            file.write(bytes([own[0] ^ 1]) + own[1:])
        proof = verify(*grafted)
        assert not proof.holds and named(proof) == {name}
        with open(stored.path, "r+b") as file:
            file.seek(last)
            file.write(own)
    assert verify(*grafted).holds


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_wherever_it_is(grafted, both, value):
    def poison(tensors):
        for tensor in tensors.values():
            tensor[-1] = value

    edit(grafted[0], poison)
    proof = verify(*grafted[: 3 if both else 2])
    assert not proof.holds and named(proof) == set(TensorReader(grafted[0]).names())


@pytest.mark.parametrize(
    "options",
    [
        {"merger_init": "xavier"},
        {"merger_init": "donor", "seed": 3},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_fresh_values_are_those_of_the_options(made, tmp_path, options):
    assert verify(*made(**options)).holds
    copy = shutil.copytree(made(**options)[0], tmp_path / "copy")
    rewrite(copy / "graft_report.json", lambda report: report["options"].update(seed=1))
    found = named(verify(copy, *made(**options)[1:]))
    assert found == {EMBEDDING, HEAD, MERGER, MERGER.replace("2", "0")} - (
        {MERGER.replace("2", "0")} if "merger_init" in options and "seed" in options else set()
    )


def test_without_a_report_the_merger_is_not_said_to_be_checked(grafted, capsys):
    (grafted[0] / "graft_report.json").unlink()
    edit(grafted[0], lambda tensors: tensors[MERGER].zero_())
    proof = verify(*grafted)
    note = "no graft_report.json: the merger and 16 new rows of the embedding were not checked"
    assert proof.holds and proof.notes == [note]


def test_without_a_vision_donor_what_was_not_looked_at_is_told(grafted):
    (note,) = verify(*grafted[:2]).notes
    assert note.startswith("without --vision the tower, the merger, new rows") and "ids of" in note


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "1"},
        {"seed": True},
        {"seed": 10**23},
        {"dtype": "int8"},
        {"variant": None},
        {"llm_layers": "3"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_report_with_options_that_are_none(grafted, capsys, change):
    rewrite(grafted[0] / "graft_report.json", lambda report: report["options"].update(change))
    assert main(["verify", "--model", str(grafted[0]), "--llm", str(grafted[1])]) == 2
    assert "graft_report.json is no report of a graft" in capsys.readouterr().err


@pytest.mark.parametrize("name", [NORM, MERGER, "model.visual.blocks.1.norm1.weight"])
@pytest.mark.parametrize("asked", [None, "float16"])
def test_a_tensor_in_another_dtype_is_a_difference(made, tmp_path, name, asked):
    hybrid, *donors = made(dtype=asked) if asked else made(seed=5)
    copy = shutil.copytree(hybrid, tmp_path / "copy")
    other = torch.bfloat16 if asked else torch.float16
    edit(copy, lambda tensors: tensors.update({name: tensors[name].to(other)}))
    proof = verify(copy, *donors)
    assert not proof.holds and named(proof) == {name}
    held = "BF16" if asked else "F16"
    assert any(difference.how.startswith(f"is {held}, ") for difference in proof.differences)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_converted_tensors_are_compared_with_the_donors_converted(made, tmp_path, dtype):
    hybrid, llm, vision = made(dtype=dtype)
    proof = verify(hybrid, llm, vision)
    assert proof.holds
    short = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert f"36 tensors are {short} in the hybrid and F32 in the language donor" in proof.notes[0]
    copy = shutil.copytree(hybrid, tmp_path / "hybrid")
    edit(copy, lambda t: t[UP][0].mul_(1.01))
    (found,) = verify(copy, llm, vision).differences
    assert found.name == UP and found.how.startswith("1 of 96 rows")


def test_rounded_values_are_said_to_be_rounded(made, capsys):
    hybrid, llm, vision = made(dtype="float16")
    arguments = ["verify", "--model", hybrid, "--llm", llm, "--vision", vision]
    assert main([str(argument) for argument in arguments]) == 0
    assert (
        "equals the language donor rounded to F16, its tower the vision donor's rounded to F16\n"
        in (capsys.readouterr().out)
    )


def _exchange(content):
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[3000:3002]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def _move_added(content):
    content["added_tokens"][-1]["content"] = "<another>"


def _last_merge(content):
    del content["model"]["merges"][-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_exchange, "2 tokens have not the donor's ids, such as"),
        (_move_added, "2 tokens have not the donor's ids, such as '<"),
        (_last_merge, "has the donor's tokens and cuts texts by other rules"),
    ],
)
@pytest.mark.parametrize("both", [True, False])
def test_a_foreign_tokenizer_is_named(grafted, change, said, both):
    rewrite(grafted[0] / "tokenizer.json", change)
    proof = verify(*grafted[: 3 if both else 2])
    assert not proof.holds and named(proof) == {"tokenizer.json"}
    assert said in proof.differences[0].how


def test_a_tokenizer_that_cuts_otherwise(grafted):
    def cut(content):
        del content["model"]["merges"][50:]

    rewrite(grafted[0] / "tokenizer.json", cut)
    (found,) = verify(*grafted).differences
    assert found.how == "cuts 6 of 6 texts otherwise than the donor's"


def test_settings_that_do_not_fit_are_named(grafted):
    path = grafted[0] / "preprocessor_config.json"
    rewrite(path, lambda content: content.update(patch_size=16))
    (found,) = verify(*grafted).differences
    assert f"{path}: patch_size is 16, but the tower's is 14" in found.how


def test_the_vision_donors_tokenizer(tmp_path):
    vision, llm = write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm")

    def shorten(content):
        del content["added_tokens"][-6:]

    rewrite(llm / "tokenizer.json", shorten)
    report = build(vision, llm, tmp_path / "hybrid")
    assert report["tokenizer"]["donor"] == "vision"
    assert verify(tmp_path / "hybrid", llm, vision).holds
    proof = verify(tmp_path / "hybrid", llm)
    assert proof.holds and "the tokenizer is the vision donor's" in proof.notes[-1]
    shutil.copyfile(llm / "tokenizer.json", tmp_path / "hybrid" / "tokenizer.json")
    assert named(verify(tmp_path / "hybrid", llm, vision)) == {"tokenizer.json"}


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_texts_that_hold_pixels_are_refused(grafted, tmp_path, capsys, token):
    (tmp_path / "texts").write_text(f"fine\none {token} more\n")
    arguments = ["verify", "--model", grafted[0], "--llm", grafted[1], "--texts"]
    assert main([*map(str, arguments), str(tmp_path / "texts")]) == 2
    assert f"error: the texts hold {token}, which stands for" in capsys.readouterr().err


def test_nan_of_a_donor_is_named(tmp_path):
    vision, llm = write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm")

    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][7, 0] = float("nan")

    edit(llm, poison)
    build(vision, llm, tmp_path / "hybrid")
    (found,) = verify(tmp_path / "hybrid", llm).differences
    assert found.name == "model.language_model.layers.1.mlp.up_proj.weight"
    assert found.how == "holds infinities or nan, 1 in all, the first in row 7"

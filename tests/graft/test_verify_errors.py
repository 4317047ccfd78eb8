"""What cannot be proved or disproved: one sentence and exit code 2."""

import json
import shutil

import pytest

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.graft.__main__ import main
from vlm.graft.stream import build


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(hybrid, language donor, vision donor)."""
    root = tmp_path_factory.mktemp("made")
    llm, vision = write_llm_donor(root / "llm"), write_vision_donor(root / "vl")
    build(vision, llm, root / "hybrid")
    return root / "hybrid", llm, vision


def refused(capsys, hybrid, llm, *more):
    """The sentence with which the command ends."""
    capsys.readouterr()
    assert main(["verify", "--model", str(hybrid), "--llm", str(llm), *map(str, more)]) == 2
    error = capsys.readouterr().err.splitlines()
    error = [line for line in error if line.startswith("error: ")]
    assert len(error) == 1
    return error[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no text; write one a line"),
        (b" \n\n\t\n", "holds no text; write one a line"),
        (b"fine\n\xff\xfe", "is not UTF-8 (byte 5); save it as UTF-8"),
        (b"one two three four five six\n" * 400, "a proof takes 1 to 2048; give fewer or shorter"),
        (None, "No such file or directory"),
    ],
    ids=["empty", "blank", "latin", "long", "absent"],
)
def test_texts(made, tmp_path, capsys, content, said):
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    sentence = refused(capsys, *made[:2], "--texts", path)
    assert said in sentence
    assert str(path) in sentence or b"six" in content


def test_a_file_of_texts_is_used(made, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("The first.\n\nThe second, 视觉.\n", encoding="utf-8")
    arguments = ["verify", "--model", str(made[0]), "--llm", str(made[1]), "--texts", str(path)]
    assert main([*arguments, "--json", str(tmp_path / "p.json")]) == 0
    assert 4 < json.loads((tmp_path / "p.json").read_text())["tokens"] < 25


def test_one_token_has_no_perplexity(made, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("<|im_end|>\n")
    arguments = ["verify", "--model", str(made[0]), "--llm", str(made[1]), "--texts", str(path)]
    assert main([*arguments, "--json", str(tmp_path / "p.json")]) == 0
    proof = json.loads((tmp_path / "p.json").read_text())
    assert proof["tokens"] == 1 and proof["perplexity"] is None


def test_donors_of_other_models(made, tmp_path, capsys):
    hybrid, llm, vision = made
    wide = write_llm_donor(tmp_path / "wide", hidden_size=128)
    said = refused(capsys, hybrid, wide)
    assert "wide is not the language donor of" in said and "hidden_size is 48" in said
    more = write_llm_donor(tmp_path / "more", vocab_size=5000)
    assert "vocab_size is 4096, the donor's is 5000" in refused(capsys, hybrid, more)
    assert "model_type 'qwen2_5_vl'; --llm takes the dense Qwen3" in refused(capsys, hybrid, vision)
    assert "model_type 'graft_vl'" in refused(capsys, hybrid, hybrid)
    assert "model_type 'qwen3', not a vision-language model" in refused(capsys, llm, llm)
    assert "not a vision-language model" in refused(capsys, hybrid, llm, "--vision", llm)
    few = write_llm_donor(tmp_path / "few", vocab_size=4001)
    build(vision, few, tmp_path / "grown")
    assert "and the embedding has 4001 rows" in refused(capsys, tmp_path / "grown", few)


def test_a_vision_donor_of_another_shape(made, tmp_path, capsys):
    hybrid, llm, _ = made
    other = shutil.copytree(hybrid, tmp_path / "other")
    raw = json.loads((other / "config.json").read_text())
    raw["vision_config"] |= {"depth": 3, "fullatt_block_indexes": [1]}
    (other / "config.json").write_text(json.dumps(raw))
    said = refused(capsys, hybrid, llm, "--vision", other)
    assert "is not the vision donor of" in said and "depth is 4, the donor's is 3" in said


def test_files_that_lack_a_tensor_or_a_report_that_is_none(made, tmp_path, capsys):
    hybrid, llm, vision = made
    copy = shutil.copytree(hybrid, tmp_path / "copy")
    (copy / "graft_report.json").write_text('{"tensors": [{"action": "copied"}]}')
    assert "is no report of a graft" in refused(capsys, copy, llm, "--vision", vision)
    (copy / "graft_report.json").unlink()
    raw = json.loads((copy / "config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = 4
    (copy / "config.json").write_text(json.dumps(raw))
    assert "lacks 11 tensors: model.language_model.layers.3" in refused(capsys, copy, llm)
    (copy / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in refused(capsys, copy, llm)
    assert "does not exist" in refused(capsys, tmp_path / "absent", llm)


def test_figures_that_cannot_be_written(made, tmp_path, capsys):
    said = refused(capsys, *made[:2], "--json", tmp_path / "absent" / "p.json")
    assert "absent/p.json cannot be written: No such file" in said

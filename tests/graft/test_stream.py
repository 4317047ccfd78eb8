"""The build end to end: what is written, what is checked first, what a failed one says."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import CheckpointError, TensorReader, load_model
from vlm.graft.__main__ import main
from vlm.graft.options import BuildOptions
from vlm.graft.stream import build
from vlm.hf_config import ConfigError
from vlm.tensor_file import make_header


@pytest.fixture
def donors(tmp_path):
    return write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes_in_files_that_the_library_reads(donors, tmp_path):
    options = BuildOptions(seed=4, max_shard_size=500_000)
    build(*donors, tmp_path / "one", options)
    build(*donors, tmp_path / "two", options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 2
    held = {key: value for file in files for key, value in load_file(file).items()}
    reader = TensorReader(tmp_path / "one")
    assert sorted(held) == reader.names()
    assert all(torch.equal(held[name], reader.get(name)) for name in held)
    assert {path.name for path in tmp_path.iterdir()} == {"vl", "llm", "one", "two"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_converts_every_tensor(donors, tmp_path, dtype):
    build(*donors, tmp_path / "kept")
    build(*donors, tmp_path / "converted", BuildOptions(dtype=dtype))
    kept, converted = TensorReader(tmp_path / "kept"), TensorReader(tmp_path / "converted")
    assert {kept.dtype(name) for name in kept.names()} == {"F32"}
    for name in kept.names():
        assert torch.equal(converted.get(name), kept.get(name).to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["dtype"] == dtype
    load_model(tmp_path / "converted")


def test_a_resized_embedding_is_the_donors_rows_and_then_ours(tmp_path):
    vision = write_vision_donor(tmp_path / "vl")
    llm = write_llm_donor(tmp_path / "llm", vocab_size=4020)  # the tokenizer has 4026 ids
    build(vision, llm, tmp_path / "hybrid")
    name = "model.language_model.embed_tokens.weight"
    old, new = TensorReader(llm).get(name), TensorReader(tmp_path / "hybrid").get(name)
    assert torch.equal(new[:4020], old) and new.shape == (4026, 48)
    assert 0.01 < new[4020:].std() < 0.03


def cut(donors):
    path = donors[1] / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return r"llm/model\.safetensors is truncated"


def lose_a_shard(donors):
    (donors[0] / "model-00003-of-00013.safetensors").unlink()
    return r"model-00003-of-00013\.safetensors is missing"


def other_patches(donors):
    path = donors[0] / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"patch_size": 14', '"patch_size": 16'))
    return r"vl/preprocessor_config\.json: patch_size is 16, but the tower's is 14"


def other_tokens(donors):
    for donor in donors:
        path = donor / "config.json"
        path.write_text(
            path.read_text().replace('"image_token_id": 4012', '"image_token_id": 4014')
        )
    return r"llm/tokenizer\.json: <\|image_pad\|> is 4012 in the tokenizer, but 4014 in config"


def no_template(donors):
    (donors[0] / "chat_template.jinja").unlink()
    return "vl has no chat template"


def too_large(donors):
    """10 TB of embedding, in a file that is a hole."""
    rows, path = 5 * 10**10, donors[1] / "model.safetensors"
    reader = TensorReader(donors[1])
    tensors = []
    for name in reader.names():
        shape = (rows, 48) if "embed_tokens" in name else reader.shape(name)
        tensors.append((name, "F32", shape))
    header = make_header(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * sum(torch.Size(shape).numel() for *_, shape in tensors))
    config = donors[1] / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 4096', f'"vocab_size": {rows}'))
    return r"hybrid takes 9600\.\d\d GB more and \d+\.\d\d GB are free on its disk"


@pytest.mark.parametrize(
    "damage", [cut, lose_a_shard, other_patches, other_tokens, no_template, too_large]
)
def test_bad_donors_are_one_sentence_and_nothing_is_written(donors, tmp_path, damage):
    message = damage(donors)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        build(*donors, tmp_path / "hybrid")
    assert {path.name for path in tmp_path.iterdir()} == {"vl", "llm"}


def test_a_failure_while_writing_says_how_to_go_on(donors, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["build", "--vision", str(donors[0]), "--llm", str(donors[1])]
    assert main([*command, "--out", str(tmp_path / "file" / "hybrid")]) == 2
    error = capsys.readouterr().err
    assert "file: File exists" in error and "the same command" in error
    assert error.count("\n") == 1

"""The build end to end: what is written, what is checked first, what a failed one says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import CheckpointError, TensorReader, load_model
from vlm.graft.__main__ import main
from vlm.graft.options import BuildOptions
from vlm.graft.stream import build
from vlm.hf_config import ConfigError
from vlm.tensor_file import make_header

ROOT = Path(__file__).parents[2]


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
    """2 TB of embedding and MLPs, in a file that is a hole."""
    rows, path = 10**9, donors[1] / "model.safetensors"
    reader = TensorReader(donors[1])
    tensors = []
    for name in reader.names():
        shape = reader.shape(name)
        if "embed_tokens" in name or "mlp" in name:
            shape = (48, rows) if "down_proj" in name else (rows, 48)
        tensors.append((name, "F32", shape))
    header = make_header(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * sum(torch.Size(shape).numel() for *_, shape in tensors))
    config = donors[1] / "config.json"
    sizes = {"vocab_size": rows, "intermediate_size": rows}
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    return r"hybrid takes 1920\.\d\d GB more and \d+\.\d\d GB are free on its disk"


@pytest.mark.parametrize(
    "damage", [cut, lose_a_shard, other_patches, other_tokens, no_template, too_large]
)
def test_bad_donors_are_one_sentence_and_nothing_is_written(donors, tmp_path, damage):
    message = damage(donors)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        build(*donors, tmp_path / "hybrid")
    assert {path.name for path in tmp_path.iterdir()} == {"vl", "llm"}


@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_while_writing_says_how_to_go_on_where_it_can(donors, tmp_path, capsys, begun):
    out = tmp_path / "hybrid"
    if begun:  # a write that was killed; then its lock cannot be had
        out.with_name("hybrid.partial").mkdir()
    out.with_name("hybrid.lock").mkdir()
    assert main([*command(donors), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "hybrid.lock: Is a directory" in error and error.count("\n") == 1
    assert ("the same command goes on from" in error) is begun


def command(donors) -> list[str]:
    return ["build", "--vision", str(donors[0]), "--llm", str(donors[1])]


def dangling(folder):
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (dangling, "out exists; remove it"),
        (lambda folder: folder / ("n" * 300), "cannot be written (File name too long)"),
        (
            lambda folder: folder / "vl" / "config.json" / "out",
            "cannot be written (Not a directory)",
        ),
    ],
)
def test_an_output_that_cannot_be_is_told_before_a_donor_is_looked_for(
    donors, tmp_path, capsys, name, message
):
    out = name(tmp_path)
    nobody = ["build", "--vision", "no/such/donor", "--llm", "no/such/donor"]
    assert main([*nobody, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seed", "9" * 23], "give a whole number from 0 to 2^63"),
        (["--seed", "-1"], "give a whole number from 0 to 2^63"),
        (["--llm_layers", "0"], "--llm_layers 0: give 1 or more"),
        (["--max_shard_size", "9" * 400 + "GB"], "is no size"),
        (["--vision", "v" * 5000], "does not exist; give the directory"),
        (["--vision", ""], "an empty name does not exist"),
    ],
)
def test_bad_options_are_one_sentence(donors, tmp_path, capsys, option, message):
    assert main([*command(donors), "--out", str(tmp_path / "out"), *option]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_config_names_the_dtype_that_the_files_have(donors, tmp_path):
    for donor in donors:  # a conversion tool that left the old one there
        path = donor / "config.json"
        raw = json.loads(path.read_text()) | {"torch_dtype": "bfloat16"}
        if "vision_config" in raw:
            raw["vision_config"] |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
        path.write_text(json.dumps(raw))
    build(*donors, tmp_path / "hybrid")
    config = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "bfloat16" not in json.dumps(config)


def test_values_that_become_zero_are_counted(donors, tmp_path, capsys):
    path = donors[1] / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:3] = torch.tensor([1e-9, -1e-9, 0.0])
    save_file(tensors, path)
    build(*donors, tmp_path / "hybrid", BuildOptions(dtype="float16"))
    said = capsys.readouterr().err
    assert re.search(r"note: \d+ values too small for float16 became 0", said)


INTERRUPTED = """
import os, signal, sys
from vlm.graft.__main__ import main
sys.addaudithook(
    lambda event, _: os.kill(os.getpid(), signal.SIGINT) if event == "os.rename" else None
)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (["-c", INTERRUPTED], 130, "stopped; run it again, a build goes on from what it has"),
        (["-m", "vlm.graft"], 141, ""),
    ],
)
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(donors, tmp_path, program, code, said):
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads what is printed
    result = subprocess.run(
        [sys.executable, *program, *command(donors), "--out", tmp_path / "out"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert result.returncode == code and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and "Error" not in result.stderr

"""The command that serves, and what is refused before it starts.

Processes are real ones; `vllm` is tests/serve/fake_vllm.py. The real one is in
tests/serve/test_launch_vllm.py.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import serve.launch
from serve.launch import main
from serve.preflight import GIB, check_gpus
from serve.serve_config import ServeConfig, parse, vllm_command
from serve.usage import UsageError
from serve.vllm_env import vllm_environment
from tests.serve.processes import ROOT
from tests.tiny import write_llm_donor
from vlm.data.limits import Limits
from vlm.hf_config import read_config

RECIPE = [
    *("--served-model-name", "Qwen3-VL"),
    *("--host", "127.0.0.1"),
    *("--port", "8000"),
    *("--max-model-len", "8192"),
    *("--gpu-memory-utilization", "0.9"),
    *("--dtype", "auto"),
    *("--limit-mm-per-prompt", '{"image":5,"video":2}'),
    "--mm-processor-kwargs",
    '{"images_kwargs":{"size":{"shortest_edge":3136,"longest_edge":1003520}},'
    '"videos_kwargs":{"size":{"shortest_edge":12544,"longest_edge":50176}}}',
    *("--media-io-kwargs", '{"video":{"fps":2.0,"min_frames":4,"max_frames":12,"num_frames":-1}}'),
    *("--mm-processor-cache-gb", "0"),
    *("--override-generation-config", '{"max_new_tokens":2048}'),
]


def test_the_defaults_are_the_recipes_limits():
    assert vllm_command(parse(["dir"]), cpu=False) == ["vllm", "serve", "dir", *RECIPE]
    written = yaml.safe_load((ROOT / "configs/serve.yaml").read_text())
    defaults = ServeConfig(Path("dir"))
    known = {field.name: getattr(defaults.limits, field.name) for field in fields(Limits)}
    assert written == {name: known.get(name, getattr(defaults, name)) for name in written}


def test_on_a_cpu_vllm_computes_eagerly_in_float32_unless_told_otherwise():
    auto, told = (
        vllm_command(parse(["dir", *more]), cpu=True) for more in ([], ["--dtype", "bfloat16"])
    )
    assert auto[-1] == told[-1] == "--enforce-eager"
    assert auto[auto.index("--dtype") + 1] == "float32"
    assert told[told.index("--dtype") + 1] == "bfloat16"


def test_environment_then_file_then_flag(tmp_path, monkeypatch):
    file = tmp_path / "serve.yaml"
    file.write_text("video_max_pixels: 20000\nfps_max_frames: 8\nextra: [--max-num-seqs, '4']\n")
    monkeypatch.setenv("MAX_PIXELS", "200704")
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "30000")
    monkeypatch.setenv("FPS_MAX_FRAMES", "6")
    arguments = ["dir", "--config", str(file), "--fps_max_frames", "10", "--", "--seed", "1"]
    config = parse(arguments)
    limits = (config.limits.max_pixels, config.limits.video_max_pixels, config.fps_max_frames)
    assert limits == (200704, 20000, 10)
    assert vllm_command(config, cpu=False)[-4:] == ["--max-num-seqs", "4", "--seed", "1"]


def test_many_gpus_on_many_machines():
    common = ["dir", "--replicas", "2", "--tensor_parallel_size", "4", "--nnodes", "2"]
    common += ["--pipeline_parallel_size", "2", "--master_addr", "10.0.0.1"]
    head, other = (
        vllm_command(parse([*common, "--node_rank", rank]), cpu=False)[len(RECIPE) + 3 :]
        for rank in "01"
    )
    parallel = [
        *("--data-parallel-size", "2"),
        *("--tensor-parallel-size", "4"),
        *("--pipeline-parallel-size", "2"),
        *("--nnodes", "2"),
    ]
    address = ["--master-addr", "10.0.0.1", "--master-port", "29501"]
    assert head == [*parallel, "--node-rank", "0", *address]
    assert other == [*parallel, "--node-rank", "1", *address, "--headless"]


def test_vllms_own_parser_reads_the_command_as_it_is_meant(model):
    pytest.importorskip("vllm")
    arguments = [str(model), "--max_images", "3", "--max_pixels", "200704", "--replicas", "2"]
    arguments += ["--tensor_parallel_size", "2", "--pipeline_parallel_size", "3", "--nnodes", "2"]
    arguments += ["--node_rank", "1", "--master_addr", "10.0.0.1", "--", "--max-num-seqs", "7"]
    config = parse(arguments)
    script = (
        "import json, sys\n"
        "from vllm.entrypoints.cli.serve import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "read = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
        "print('READ', json.dumps(vars(read), default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *vllm_command(config, cpu=True)[2:]],
        env=os.environ | vllm_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout.partition("READ ")[2])
    expected = {
        "model_tag": str(model),
        "served_model_name": ["Qwen3-VL"],
        "host": "127.0.0.1",
        "port": 8000,
        "max_model_len": 8192,
        "gpu_memory_utilization": 0.9,
        "dtype": "float32",
        "limit_mm_per_prompt": {"image": 3, "video": 2},
        "mm_processor_kwargs": {
            "images_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 200704}},
            "videos_kwargs": {"size": {"shortest_edge": 12544, "longest_edge": 50176}},
        },
        "media_io_kwargs": {
            "video": {"fps": 2.0, "max_frames": 12, "min_frames": 4, "num_frames": -1}
        },
        "override_generation_config": {"max_new_tokens": 2048},
        "data_parallel_size": 2,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "nnodes": 2,
        "node_rank": 1,
        "master_addr": "10.0.0.1",
        "master_port": 29501,
        "headless": True,
        "enforce_eager": True,
        "max_num_seqs": 7,
    }
    assert {name: read[name] for name in expected} == expected


# --- what is refused before vLLM starts ----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere does not exist"),
        ([], "model"),
        (["--max_pixel", "5"], "--max_pixel"),
        (["--max_images", "-1"], "max_images is -1"),
        (["--port", "0"], "port is 0"),
        (["--gpu_memory_utilization", "90"], "gpu_memory_utilization is 90"),
        (["--video_max_pixels", "784"], "video_max_pixels 784 is below video_min_pixels 12544"),
        (["--max_pixels", "784"], "max_pixels 784 is below min_pixels 3136"),
        (["--nnodes", "2"], "master_addr"),
        (["--nnodes", "2", "--master_addr", "a", "--node_rank", "2"], "node_rank is 2"),
        (["--nnodes", "2", "--master_addr", "a"], "2 machines cannot share evenly"),
        (["--tensor_parallel_size", "3"], "tensor_parallel_size 3 does not divide the 4 attention"),
        (["--pipeline_parallel_size", "4"], "layers, 3"),
        (["--api_key"], "--api_key has no value"),
        (["--", "--api-key", "x"], "--api_key"),
        (["--host", "no host"], "cannot listen on no host"),
        (["--log", "/nowhere/log"], "/nowhere/log"),
    ],
)
def test_a_mistake_is_one_sentence(model, arguments, message, capsys):
    given = arguments if arguments[:1] in ([], ["/nowhere"]) else [str(model), *arguments]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said


def test_a_mistake_on_a_real_command_line(launch):
    launcher = launch("--api_key")
    assert launcher.process.wait(60) == 2
    assert launcher.output.read_text() == "error: --api_key has no value\n"


@pytest.mark.parametrize("line", ["max_pixel: 5", "api_key: secret"])
def test_a_key_that_a_file_may_not_have(model, tmp_path, line, capsys):
    (tmp_path / "bad.yaml").write_text(line)
    assert main([str(model), "--config", str(tmp_path / "bad.yaml")]) == 2
    assert line.split(":")[0] in capsys.readouterr().err


def test_an_environment_that_is_no_number(model, monkeypatch, capsys):
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "many")
    assert main([str(model)]) == 2
    assert "VIDEO_MAX_PIXELS='many'" in capsys.readouterr().err


def damage(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if what == "another model":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    elif what == "no JSON":
        (folder / "config.json").write_text("{")
    elif what == "odd tower":
        config["vision_config"]["num_heads"] = 1
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "a run":
        (folder / "config.json").unlink()
        (folder / "latest").write_text("checkpoint-5")
    else:
        (folder / what).unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config.json", "config.json does not exist"),
        ("model.safetensors", "neither model.safetensors nor"),
        ("video_preprocessor_config.json", "serve/export.py"),
        ("a run", "serve/export.py"),
        ("another model", "model_type 'llava'"),
        ("no JSON", "cannot be read as JSON"),
        ("odd tower", "does not divide the 1 heads of the vision tower"),
    ],
)
def test_a_directory_that_cannot_be_served(model, tmp_path, what, message, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    damage(folder, what)
    split = ["--tensor_parallel_size", "2"] if what == "odd tower" else []
    assert main([str(folder), *split]) == 2
    said = capsys.readouterr().err
    assert message in said and str(folder) in said + str(folder) * (what == "odd tower")


def test_a_language_model_is_not_served(tmp_path, capsys):
    assert main([str(write_llm_donor(tmp_path / "llm"))]) == 2
    assert "language model without vision (model_type qwen3)" in capsys.readouterr().err


def test_a_port_in_use(model, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main([str(model), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err


def test_too_little_memory(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve.launch, "is_cpu", lambda: True)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    assert main([str(model)]) == 2
    assert "take 100000.0 GiB and this machine has" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "much")
    assert main([str(model)]) == 2
    assert "VLLM_CPU_KVCACHE_SPACE='much' is no whole number of GiB" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert main([str(model), "--max_model_len", "2000000"]) == 2
    assert "above what the model has positions for, 32768" in capsys.readouterr().err
    long = tmp_path / "long"
    shutil.copytree(model, long)
    config = json.loads((long / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2_000_000
    (long / "config.json").write_text(json.dumps(config))
    assert main([str(long), "--max_model_len", "2000000"]) == 2
    # 2 x 3 layers x 2 heads x 32 x 4 bytes x 2,000,000 tokens
    assert "takes 2.9 GiB of key/value cache and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "gpus", "message"),
    [
        ([], [(80, 80)], None),
        (["--replicas", "2"], [(80, 80)], "2 GPUs are asked for on this machine and it has 1"),
        ([], [(70, 80)], "GPU 0 has 70.0 GiB free and gpu_memory_utilization 0.9 asks for 72.0"),
        (["--gpu_memory_utilization", "0.8"], [(70, 80)], None),
        (["--tensor_parallel_size", "2"], [(80, 80), (9, 80)], "GPU 1 has 9.0 GiB free"),
        # 2 bytes x 3 x 2 x 2 x 32 x 400,000,000 tokens are 286 GiB
        (["--max_model_len", "400000000"], [(80, 80)], "take 286.1 GiB a GPU"),
    ],
)
def test_gpus_and_their_memory(model, arguments, gpus, message):
    config = parse([str(model), *arguments])
    memory = [(free * GIB, total * GIB) for free, total in gpus]
    if message is None:
        check_gpus(config, read_config(model), memory)
    else:
        with pytest.raises(UsageError, match=message):
            check_gpus(config, read_config(model), memory)


def test_no_vllm(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main([str(model)]) == 2
    assert "vllm is not installed" in capsys.readouterr().err


# --- processes -----------------------------------------------------------------------------------

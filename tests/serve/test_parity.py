"""serve/parity.py: it agrees where all is well, and names what differs where it is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serve import parity
from serve.conversation import Sampling
from serve.endpoint import Endpoint
from serve.export import main as export
from serve.launch import running_server
from serve.limits import read_limits
from serve.local import Local
from serve.parity_requests import built_in_requests, picture
from serve.serve_config import ServeConfig
from tests.serve.processes import free_port
from tests.tiny import write_hybrid
from vlm.data.processor import Processor

ROOT = Path(__file__).parents[2]
KINDS = len(built_in_requests())


def exported(folder: Path, tie: bool, hidden_size: int, *flags: str) -> Path:
    source = write_hybrid(folder / "hybrid", tie=tie, hidden_size=hidden_size)
    assert export([str(source), "--out", str(folder / "export"), *flags]) == 0
    return folder / "export"


def run(folder: Path, *flags: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The command in a process of its own, as vLLM takes over the one that it is in."""
    rows = folder.with_suffix(".json")
    result = subprocess.run(
        [sys.executable, "serve/parity.py", folder, "--json", rows, *flags],
        cwd=ROOT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    assert rows.exists(), result.stderr
    return result, json.loads(rows.read_text())


def test_all_three_agree_on_every_kind_of_request(tmp_path):
    """The one vLLM engine of `make test`."""
    result, rows = run(exported(tmp_path, tie=True, hidden_size=48))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["engine"] for row in rows].count("vllm") == KINDS == len(rows) // 2
    assert all(row["same_tokens"] == row["tokens"] == 16 for row in rows)
    assert max(row["logprobs"] for row in rows) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(True, 128), (False, 48), (False, 128)])
def test_every_shape_of_head_agrees(tmp_path, shape):
    result, rows = run(exported(tmp_path, *shape))
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(row["passed"] for row in rows)


@pytest.mark.slow
def test_in_bfloat16_positions_still_agree(tmp_path):
    """vLLM would round a video's seconds to the model's dtype."""
    result, rows = run(exported(tmp_path, True, 48), "--dtype", "bfloat16", "--engines", "vllm")
    assert all(row["ids"] and row["grids"] and row["positions"] for row in rows), result.stdout
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_stock_vllm_serves_the_stock_format_without_the_plugin(tmp_path):
    folder = exported(tmp_path, False, 128, "--format", "vllm_stock")
    result, rows = run(folder, "--engines", "vllm")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(rows) == KINDS


CACHED = """
import sys, torch
from pathlib import Path
from serve.limits import read_limits
from serve.parity import compare
from serve.parity_requests import built_in_requests
from serve.views import our_views
from serve.vllm_view import VLLM
from vlm.data.processor import Processor
if __name__ == "__main__":
    folder, samples = Path(sys.argv[1]), built_in_requests()
    limits = read_limits(folder)
    ours = our_views(
        folder, samples, Processor.from_pretrained(folder, limits), torch.float32, 16)
    # a prompt of 1,300 tokens is computed in several steps, and the second time not at all
    vllm = VLLM(folder, limits, torch.float32, max_num_batched_tokens=1408, max_num_seqs=4,
                enable_chunked_prefill=True, enable_prefix_caching=True, disable_log_stats=False)
    for _ in range(2):
        for sample, our, their in zip(samples, ours, vllm.views(samples, 16), strict=True):
            assert compare(sample.id, "vllm", our, their, torch.float32).passed, sample.id
    hits = {m.name: m.value for m in vllm.llm.get_metrics() if "prefix_cache_hits" in m.name}
    vllm.close()
    print(hits)
    assert max(hits.values()) > 1000, hits
"""


@pytest.mark.slow
def test_prefix_caching_and_chunked_prefill_change_nothing(tmp_path):
    command = [sys.executable, "-c", CACHED, exported(tmp_path, True, 48)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("good"), tie=True, hidden_size=48)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_sections(config):
    section = config["text_config"]["rope_parameters"]["mrope_section"]
    config["text_config"]["rope_parameters"]["mrope_section"] = section[::-1]


def other_pixels(config):
    config["image_processor"]["size"]["longest_edge"] = 200704


def sample_less(config):
    config["video_processor"]["fps"] = 1


def other_mean(config):
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("file", "change", "differs", "names"),
    [
        ("config.json", swap_sections, "logprobs", {"image resized", "video", "very wide"}),
        ("processor_config.json", other_pixels, "grids", {"image above max_pixels"}),
        ("processor_config.json", sample_less, "positions", {"video, image, text"}),
        ("processor_config.json", other_mean, "pixels", {"image resized", "JPEG", "grey"}),
    ],
)
def test_what_transformers_does_otherwise_is_named(good, tmp_path, file, change, differs, names):
    folder = tmp_path / "export"
    shutil.copytree(good, folder)
    edit(folder / file, change)
    samples = [s for s in built_in_requests() if s.id == "text" or s.id in names]
    # a changed config would be ours as well, so ours is the good export's
    ours = parity.our_views(good, samples, processor_of(good), torch.float32, 16)
    views = parity.transformers_views(folder, samples, processor_of(good), torch.float32, 16)
    rows = [
        parity.compare(sample.id, "transformers", *pair, torch.float32)
        for sample, *pair in zip(samples, ours, views, strict=True)
    ]
    failed = {row.request for row in rows if not row.passed}
    assert failed == names, parity.table(rows)
    same = {"grids": True, "positions": True}.get(differs)
    for row in rows:
        value = getattr(row, differs)
        if row.request in names:
            assert value != same if same else value > 1e-4
    assert "<-- differs" in parity.table(rows)


def processor_of(folder):
    return Processor.from_pretrained(folder, read_limits(folder))


def test_ones_own_data_is_asked_without_its_answers(good, tmp_path, capsys):
    (tmp_path / "cat.png").write_bytes(picture(50, 40))
    turns = [
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": "A cat."},
    ]
    row = {"messages": turns, "images": ["cat.png"]}
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 3)
    data = str(tmp_path / "data.jsonl")
    flags = ["--rows", "2", "--engines", "transformers", "--max_new_tokens", "4"]
    assert parity.main([str(good), "--data", data, *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("4/4") == 2 and "all 2 comparisons agree" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "does not exist"),
        (["{good}", "--data", "{good}/README.md"], "not a line of JSON"),
        (["{good}", "--data", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_named(good, arguments, words, capsys):
    given = [argument.format(good=good) for argument in arguments]
    assert parity.main([*given, "--engines", "transformers"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_that_share_the_layers_answer_as_one(tmp_path):
    """Tensor parallelism, which vllm-cpu has too: heads, MLP and vocabulary in halves."""
    folder, sampling = exported(tmp_path, False, 48), Sampling(max_new_tokens=16)
    config = ServeConfig(
        model=folder,
        port=free_port(),
        max_model_len=2048,
        tensor_parallel_size=2,
        log=tmp_path / "vllm.log",
    )
    samples = built_in_requests()
    with running_server(config) as url:
        served = dict(Endpoint(url).ask_many(samples, sampling, 4))
    local = dict(Local(folder).ask_many(samples, sampling, 4))
    whole = {name: answer.text.rstrip("\ufffd") for name, answer in served.items()}
    assert whole == {name: answer.text.rstrip("\ufffd") for name, answer in local.items()}

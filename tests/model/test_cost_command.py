"""`python -m vlm.cost`, and docs/cost.md: its tables are the code's figures, its commands run."""

import json
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from tests.model.full_size import EIGHT_BILLION
from tests.test_readme import blocks, commands
from tests.tiny import GOLDEN_MODEL, hybrid_config, write_hybrid
from vlm.cost import CONVENTION, PARTS, parameters_by_module, sample_flops
from vlm.cost.__main__ import main
from vlm.cost.hardware import PEAKS
from vlm.cost.memory import Load, decoder_layer
from vlm.cost.report import (
    LARGEST_IMAGE,
    LONGEST,
    Setup,
    communication,
    largest_micro_batch,
    make_report,
    unit_flops,
)
from vlm.cost.samples import Samples, one_sample, read_samples
from vlm.data.limits import Limits
from vlm.hf_config import parse_config
from vlm.recompute import Policy

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
TINY = parse_config(hybrid_config())
DESCRIBED = ["--tokens", "2000", "--targets", "100"]


# ---- docs/cost.md


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def documented_sample() -> Samples:
    return one_sample(LONGEST, 1000, [(896, 1120)], EIGHT_BILLION.vision, Limits())


def parameter_table() -> str:
    counts = parameters_by_module(EIGHT_BILLION)
    counts["all"] = sum(counts.values())
    return table(["module", "parameters"], [[name, f"{n:,}"] for name, n in counts.items()])


def flops_table() -> str:
    columns = [unit_flops(EIGHT_BILLION, trains) for trains in ((), ("aligner",), PARTS)]
    rows = [[name, *(f"{column[name] / 1e9:.4f}" for column in columns)] for name in columns[0]]
    return table(["GFLOPs", "forward", "stage 1", "stage 2"], rows)


def memory_table() -> str:
    rows = []
    for stage, policy in product((1, 2), get_args(Policy)):
        report = make_report(EIGHT_BILLION, documented_sample(), Setup(stage, recompute=policy))
        memory = report["memory"]
        bucket = memory["training state"].pop("reduction bucket")
        parts = sum(memory["training state"].values()), bucket, sum(memory["activations"].values())
        figures = [f"{n / 1e9:.1f}" for n in (*parts, memory["total"])]
        rows.append([str(stage), policy, *figures])
    head = ["stage", "recompute", "weights and training state", "reduction bucket"]
    return table([*head, "activations", "all, GB"], rows)


def communication_table() -> str:
    counts = parameters_by_module(EIGHT_BILLION)
    trained = counts["merger"], sum(counts.values())
    columns = [communication(n, Setup(stage)) for stage, n in zip((1, 2), trained, strict=True)]
    rows = [[name, *(f"{c[name] / 1e9:.2f}" for c in columns)] for name in columns[0]]
    return table(["GB sent by each GPU in a step", "stage 1", "stage 2"], rows)


@pytest.mark.parametrize(
    "make",
    [parameter_table, flops_table, memory_table, communication_table],
    ids=lambda f: f.__name__,
)
def test_the_doc_shows_the_figures_of_the_code(make):
    assert make() in DOC


def test_the_doc_states_the_convention_and_what_the_units_are():
    text = " ".join(DOC.split())
    assert CONVENTION.removeprefix("useful FLOPs: ") in text
    assert f"{LONGEST:,}" in text and "x".join(map(str, LARGEST_IMAGE[1:])) in text.replace(" ", "")
    assert all(f"`{device}` {peak:,}" in text for device, peak in PEAKS.items())
    assert all(f"`{policy}`" in DOC for policy in get_args(Policy))
    config = EIGHT_BILLION.text
    kept = [
        config.num_hidden_layers * decoder_layer(config, 1, True, policy, 2) / 1e6
        for policy in get_args(Policy)
    ]
    assert f"`none` keeps {kept[0]:.2f} MB, `pointwise` {kept[1]:.2f} MB" in text
    assert f"`full` {kept[2]:.3f} MB" in text


def test_the_commands_of_the_doc_run(tmp_path, monkeypatch, capsys):
    write_hybrid(tmp_path / "models/graft-8b")
    (lengths,) = blocks(DOC, "json")
    (tmp_path / "sizes.jsonl").write_text(lengths)
    monkeypatch.chdir(tmp_path)
    lines = commands(DOC)
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("python -m vlm.cost ")
        assert main(shlex.split(line)[3:]) == 0
        assert "predicted:" in capsys.readouterr().out
    report = json.loads((tmp_path / "cost.json").read_text())
    assert report["samples"]["count"] == len(lengths.splitlines())


# ---- the command


def test_it_runs_as_a_module_from_anywhere(model, tmp_path):
    command = [sys.executable, "-m", "vlm.cost", "--model", model, "--stage", "1"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *DESCRIBED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "merger" in done.stdout and CONVENTION in done.stdout
    assert "no time is predicted" in done.stdout


def test_the_figures_of_a_step_add_up(model, tmp_path, capsys):
    path = tmp_path / "cost.json"
    arguments = ["--model", model, "--stage", "2", *DESCRIBED, "--images", "896x1120,56x84"]
    arguments += ["--gpus", "4", "--peak_tflops", "2", "--mfu", "0.25", "--json", str(path)]
    assert main(arguments) == 0
    report = json.loads(path.read_text())
    one = sample_flops(TINY, 2000, [(1, 64, 80), (1, 4, 6)], 100, PARTS)
    step = report["step"]
    assert step["samples"] == 2 * 8 * 4 and step["micro-batches per GPU"] == 8
    assert step["FLOPs"] == pytest.approx(64 * one)
    assert step["seconds"] == pytest.approx(64 * one / (4 * 2e12 * 0.25))
    assert step["tokens per second"] == pytest.approx(64 * 2000 / step["seconds"])
    assert sum(step["FLOPs by module"].values()) == pytest.approx(step["FLOPs"])
    assert report["micro_batch"] == {"tokens": 4000, "targets": 200, "patches": 2 * (5120 + 24)}
    memory = report["memory"]
    parts = [*memory["training state"].values(), *memory["activations"].values()]
    assert memory["total"] == sum(parts)
    trained = report["parameters"]["trained"]
    assert trained == report["parameters"]["all"]
    sent = report["communication"]
    assert sent["gradients, if reduce-scattered"] == trained * 3 // 4 * 4 * 8
    assert sent["updated weights, all-gathered"] == trained * 3 // 4 * 2
    printed = capsys.readouterr().out
    assert f"{step['tokens per second']:,.0f} tokens/s at an MFU of 0.25" in printed


def test_each_tower_has_its_policy(model, tmp_path, capsys):
    kept = {}
    for vit in ("full", "pointwise"):
        path = tmp_path / f"{vit}.json"
        arguments = ["--images", "896x1120", "--vit_recompute", vit, "--json", str(path)]
        assert main(["--model", model, "--stage", "2", *DESCRIBED, *arguments]) == 0
        assert f"recompute full, of the ViT {vit}" in capsys.readouterr().out
        kept[vit] = json.loads(path.read_text())["memory"]["activations"]
    assert kept["full"]["decoder"] == kept["pointwise"]["decoder"]
    assert kept["full"]["vision tower"] < kept["pointwise"]["vision tower"]


def test_one_gpu_sends_nothing(model, capsys):
    assert main(["--model", model, "--stage", "2", "--gpus", "1", *DESCRIBED]) == 0
    printed = capsys.readouterr().out
    assert "sent by" not in printed and "bucket" not in printed


def test_memory_is_that_of_the_largest_micro_batch():
    """Which need not hold the longest samples: images leave more bytes than tokens."""
    rows = [(100, 5, []), (900, 5, []), (700, 5, [[1, 40, 40]]), (60, 5, [[1, 8, 8]]), (950, 5, [])]
    load = largest_micro_batch(TINY, Samples.of(rows), Setup(2))
    assert load == Load(tokens=700 + 950, targets=10, patches=1600)
    alone = largest_micro_batch(TINY, Samples.of(rows[3:4]), Setup(2))
    assert alone == Load(tokens=120, targets=10, patches=128)


def test_the_mean_and_the_largest_sample_are_told(tmp_path):
    path = tmp_path / "sizes.jsonl"
    path.write_text(
        '{"length": 500, "targets": 9, "grids": [[1, 20, 30], [2, 4, 4]]}\n\n'
        '{"length": 40, "targets": 0}\n'
    )
    samples = read_samples(path, TINY.vision)
    assert samples.patches.tolist() == [632, 0]
    report = make_report(TINY, samples, Setup(1, global_batch_size=16))
    each = [
        sample_flops(TINY, 500, [(1, 20, 30), (2, 4, 4)], 9, ["aligner"]),
        sample_flops(TINY, 40, [], 0, ["aligner"]),
    ]
    told = report["samples"]
    assert (told["tokens"], told["visual tokens"], told["target tokens"]) == (540, 158, 9)
    assert (told["most tokens"], told["most FLOPs"]) == (500, each[0])
    assert told["FLOPs"] == sum(each) and told["mean FLOPs"] == np.mean(each)
    assert report["step"]["FLOPs"] == pytest.approx(8 * sum(each))


def test_a_vision_donor_is_a_model_too(capsys):
    assert main(["--model", str(GOLDEN_MODEL), "--stage", "1", *DESCRIBED]) == 0


def test_pixels_are_limited_as_in_training(model, monkeypatch, tmp_path):
    """MAX_PIXELS bounds an image of --images, too."""
    monkeypatch.setenv("MAX_PIXELS", str(56 * 56))
    path = tmp_path / "cost.json"
    arguments = ["--images", "896x896", "--json", str(path)]
    assert main(["--model", model, "--stage", "2", *DESCRIBED, *arguments]) == 0
    assert json.loads(path.read_text())["micro_batch"]["patches"] == 2 * 16


def test_a_frozen_decoder_costs_two_thirds():
    sample = Samples.of([(1000, 100, [])])
    steps = [make_report(EIGHT_BILLION, sample, Setup(stage))["step"] for stage in (1, 2)]
    linear = [step["FLOPs by module"]["decoder linear"] for step in steps]
    assert linear[0] / linear[1] == pytest.approx(2 / 3)

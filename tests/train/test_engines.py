"""Every engine gives the numbers of one plain process, and resumes exactly.

Tolerances: those of test_step.py. The runs on two ranks were made by the fixture `two_ranks`.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.train.engines import (
    CONSTANT,
    STAGE_1,
    ZERO,
    broken_and_whole,
    run_several,
)
from tests.train.runs import OPTIONS, log_of, run_plain, run_ranks, same, trainer_of, weights_of
from tests.train.test_step import LOSS, WEIGHT
from train.config import TrainConfig
from train.sft import train
from train.world import World
from vlm.cost import part_of
from vlm.data.index import build_index
from vlm.data.loader import make_plan
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.processor import Processor
from vlm.data.sources import open_sources


@pytest.fixture(scope="module")
def constant_run(setting, tmp_path_factory):
    return run_plain(setting, tmp_path_factory.mktemp("constant") / "run", **CONSTANT)


def masters_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """By parameter, flat, from the fragments of all ranks."""
    pieces = defaultdict(dict)
    for file in (run / f"checkpoint-{step}" / "engine").glob("rank-*.safetensors"):
        for key, values in load_file(file).items():
            parameter, kind, start = [*key.split("|"), "", ""][:3]
            if kind == "master":
                pieces[parameter][int(start)] = values.double()
    return {name: torch.cat([found[at] for at in sorted(found)]) for name, found in pieces.items()}


def agree(run, reference) -> None:
    """Losses, norms, counts and weights, of six steps."""
    for ours, theirs in zip(log_of(run), log_of(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=LOSS)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-5)
        expected = pytest.approx(theirs["grad_norm_by_group"], rel=3e-5, abs=1e-6)
        assert ours["grad_norm_by_group"] == expected
        assert (ours["samples"], ours["targets"]) == (theirs["samples"], theirs["targets"])
    ours, theirs = weights_of(run, 6), weights_of(reference, 6)
    assert max((ours[n] - theirs[n]).abs().max() for n in theirs) < WEIGHT


@pytest.mark.parametrize("name", ["zero1", "zero2_offload", "file"])
def test_two_ranks_equal_one_process(constant_run, two_ranks, name):
    """A file of DeepSpeed's decides how it works, and not what is learnt."""
    agree(two_ranks / name, constant_run)


def test_one_rank_of_zero_equals_one_process(setting, constant_run, tmp_path):
    agree(run_ranks(setting, tmp_path / "run", 1, **CONSTANT), constant_run)


@pytest.mark.parametrize("name", ["zero2 bfloat16", "zero2_offload float32"])
def test_a_resumed_run_is_exact(two_ranks, name):
    assert same(weights_of(two_ranks / f"{name} broken", 6), weights_of(two_ranks / name, 6))


@pytest.mark.slow
def test_every_engine_resumes_exactly_in_either_dtype(setting, tmp_path):
    cases = [(engine, dtype) for engine in ZERO for dtype in ("bfloat16", "float32")]
    run_several([c for case in cases for c in broken_and_whole(setting, tmp_path, *case)], 2)
    for engine, dtype in cases:
        whole = tmp_path / f"{engine} {dtype}"
        assert same(weights_of(tmp_path / f"{whole.name} broken", 6), weights_of(whole, 6))
        plain = tmp_path / f"plain {dtype}"
        if not plain.exists():
            run_plain(setting, plain, dtype=dtype, **CONSTANT)
        losses = [[line["loss"] for line in log_of(run)] for run in (whole, plain)]
        assert losses[0] == pytest.approx(losses[1], abs=LOSS if dtype == "float32" else 0.01)


def test_text_alone_beside_images_with_a_sample_that_one_rank_finds_bad(two_ranks):
    """Stage 1: where a rank has no image nothing of its own micro-batch trains."""
    damaged = two_ranks / "damaged"
    setting = {"model": damaged / "model", "dataset": [str(damaged / "data.jsonl")]}
    plain = run_plain(setting, two_ranks / "stage 1 plain", **CONSTANT | STAGE_1)
    agree(two_ranks / "stage 1", plain)
    (bad,) = (two_ranks / "stage 1" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(bad)["id"].endswith("data.jsonl:7")
    processor = Processor.from_pretrained(setting["model"])
    index, _ = build_index(open_sources(setting["dataset"]), processor)
    costs = index.costs(processor.config, frozenset({"aligner"}))
    plan = make_plan(index, costs, 6, 42, 2, Budget("samples", 1))
    pairs = [
        pair for batch in range(3) for pair in zip(*plan.ranks(Position(0, batch)), strict=True)
    ]
    assert any(plan.patches[one].any() != plan.patches[other].any() for one, other in pairs)


@pytest.mark.parametrize("engine", ZERO)
def test_a_step_that_one_rank_finds_infinite_is_refused_on_all(two_ranks, engine):
    run = two_ranks / f"refused {engine}"
    events = [(line["event"], line["step"]) for line in log_of(run) if "loss" in line]
    assert events == [("train", 1), ("refused", 2), ("train", 3)]
    assert trainer_of(run, 3)["updates"] == 2
    assert same(weights_of(run, 2), weights_of(run, 1))
    # nothing of it is left in the next step, whichever the engine
    ours, theirs = weights_of(run, 3), weights_of(two_ranks / "refused zero2", 3)
    assert max((ours[n] - theirs[n]).abs().max() for n in theirs) < WEIGHT
    assert not same(ours, weights_of(run, 2))


@pytest.mark.parametrize("name", ["zero1", "zero2_offload"])
def test_a_ratio_is_how_far_a_step_moved_the_weights(two_ranks, name):
    """Of what two ranks share, against the masters of before and after the last step."""
    weights = weights_of(two_ranks / name, 6)
    before, after = (masters_of(two_ranks / name, step) for step in (5, 6))
    squares = defaultdict(lambda: np.zeros(2))
    for parameter, values in after.items():
        moved, size = (values - before[parameter]).norm(), values.norm()
        kind = "decay" if weights[parameter].dim() > 1 else "no_decay"
        squares[f"{part_of(parameter)}/{kind}"] += (moved**2, size**2)
    expected = {group: (moved / size) ** 0.5 for group, (moved, size) in squares.items()}
    assert log_of(two_ranks / name)[-1]["update_ratio_by_group"] == pytest.approx(
        expected, rel=1e-3
    )


@pytest.fixture
def deterministic():
    yield World.start(deterministic=True)
    torch.use_deterministic_algorithms(False)


def test_a_deterministic_run_is_the_same_every_time(setting, plain_run, deterministic, tmp_path):
    run = tmp_path / "run"
    train(TrainConfig(**setting, output_dir=run, deterministic=True, **OPTIONS), deterministic)
    assert torch.are_deterministic_algorithms_enabled()
    assert same(weights_of(run, 6), weights_of(plain_run, 6))  # on a CPU it always is

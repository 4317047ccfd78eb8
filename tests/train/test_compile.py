"""`--compile`: the same run."""

import json
import os
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

import train.model
from tests.train.runs import log_of, run_plain
from train.config import TrainConfig
from train.engine import check_engine
from train.world import World
from vlm.checkpoint import TensorReader
from vlm.compile import compile_blocks

STEPS = 6


@pytest.fixture
def compiler(monkeypatch):
    """One that has compiled nothing; torch's own kernels stand for fused ones."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # of tests that import DeepSpeed
    monkeypatch.setattr(train.model, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):  # which will not do, unless it is raised
        yield
    torch._dynamo.reset()


def test_a_compiled_run_has_the_same_losses_and_files(setting, plain_run, tmp_path, compiler):
    """It saves, evaluates, answers and ends as any other."""
    held_out = {"val_dataset": setting["dataset"], "eval_steps": 3, "eval_max_new_tokens": 4}
    run = run_plain(setting, tmp_path / "run", compile=True, **held_out)
    # two pieces of each tower, for training and for evaluation, which also ran uncompiled nowhere
    assert counters["stats"]["unique_graphs"] == 8
    assert counters["frames"]["total"] == counters["frames"]["ok"] == 8
    assert (run / "answers.jsonl").read_text()
    found, expected = (
        torch.tensor([line["loss"] for line in log_of(folder)]) for folder in (run, plain_run)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (TensorReader(f / f"checkpoint-{STEPS}" / "model") for f in (run, plain_run))
    assert ours.names() == theirs.names()
    for name in ours.names():
        torch.testing.assert_close(ours.get(name), theirs.get(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiles", [False, True])
def test_deepspeed_leaves_the_compiler_on(monkeypatch, tmp_path, compiles):
    """A file is shown to DeepSpeed before any block is compiled; without one its import, which
    takes seconds, is spared."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    config = TrainConfig("m", ["d.jsonl"], "o", deepspeed=str(file), compile=compiles)
    check_engine(config, World(0, 1, torch.device("cpu"), launched=True))
    assert ("TORCHDYNAMO_DISABLE" in os.environ) != compiles

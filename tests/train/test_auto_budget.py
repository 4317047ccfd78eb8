"""`auto_budget`: micro-batches as large as the memory allows, the same again after a resume."""

import json

import pytest
import torch

import train.budget
import train.model
from tests.tiny import hybrid
from tests.train.runs import log_of, run_plain, run_ranks, run_until, same, weights_of
from train.budget import state_of
from train.config import TrainConfig, UsageError
from train.world import World
from vlm.cost import PARTS
from vlm.cost.budget import MARGIN
from vlm.cost.memory import BUCKET


@pytest.fixture
def memory(monkeypatch):
    """What the device is said to have free, as a list of one."""
    free = [32_000_000]
    monkeypatch.setattr(train.budget, "free_memory", lambda world: free[0])
    return free


def recorded(run) -> dict:
    return json.loads((run / "budget.json").read_text())


def test_weights_are_those_of_any_budget(setting, plain_run, tmp_path, capsys):
    run = run_plain(setting, tmp_path / "run", auto_budget=True)
    limits = recorded(run)
    assert limits["tokens"] > 256 and limits["patches"] > 400  # here is memory for all of a step
    assert f"budgets of a micro-batch: {limits['tokens']:,} tokens" in capsys.readouterr().out
    first, second = (log_of(r)[0]["loss"] for r in (run, plain_run))
    assert first == pytest.approx(second, rel=1e-5)


def test_a_resume_keeps_them_though_the_memory_is_another(setting, memory, tmp_path, capsys):
    whole = run_plain(setting, tmp_path / "whole", auto_budget=True)
    halves = run_until(setting, tmp_path / "run", 3, auto_budget=True, save_steps=3)
    before = recorded(halves)
    memory[0] *= 100
    run_plain(setting, halves, auto_budget=True, save_steps=3)
    assert recorded(halves) == before == recorded(whole)
    assert "as before" in capsys.readouterr().out
    assert same(weights_of(halves, 6), weights_of(whole, 6))


def test_a_device_with_less_memory_derives_them_anew(setting, memory, tmp_path, capsys):
    """What is free is never the same to a byte: a percent less is as before."""
    memory[0] = 40_000_000
    run = run_until(setting, tmp_path / "run", 3, auto_budget=True, save_steps=3)
    before = recorded(run)
    needed = before["bytes"]["state"] + before["bytes"]["activations"]
    memory[0] = int(needed / (1 - MARGIN)) * 99 // 100
    run_plain(setting, run, auto_budget=True, dry_run=True)
    assert "as before" in capsys.readouterr().out
    memory[0] = int(needed / (1 - MARGIN)) * 95 // 100
    run_plain(setting, run, auto_budget=True, save_steps=3)
    found = recorded(run)
    assert found["cause"] == before["cause"] and found["tokens"] < before["tokens"]
    assert found["bytes"]["memory"] == memory[0]


def test_a_compiled_block_keeps_more_than_pointwise(setting, memory, tmp_path, monkeypatch):
    memory[0] = 40_000_000
    monkeypatch.setattr(train.model, "compile_blocks", lambda model: None)
    runs = [
        run_plain(setting, tmp_path / f"{policy}-{compiled}", auto_budget=True, max_steps=1,
                  gradient_checkpointing=policy, compile=compiled)
        for policy in ("none", "pointwise") for compiled in (False, True)
    ]  # fmt: skip
    none, compiled_none, pointwise, compiled = map(recorded, runs)
    assert none["tokens"] == compiled_none["tokens"] == compiled["tokens"] < pointwise["tokens"]
    assert none["cause"] | {"compile": True} == compiled_none["cause"] != none["cause"]


def test_a_file_decides_the_reduction_bucket(tmp_path):
    """On a CPU no more of it is taken than there are gradients."""
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    model, sizes = hybrid(), []
    trained = sum(p.numel() for p in model.parameters())
    for settings in ("zero2", str(file)):
        config = TrainConfig("m", ["d.jsonl"], "o", deepspeed=settings)
        for device in ("cuda", "cpu"):
            world = World(0, 2, torch.device(device), launched=True)
            sizes.append(state_of(config, world, model, PARTS)["reduction bucket"])
    assert sizes == [2 * BUCKET + 6 * trained, 8 * trained, 8000, 8000]  # in bfloat16


def test_what_a_container_has_read_is_free(monkeypatch, tmp_path):
    """The kernel counts files' pages as used, and drops them where memory is asked for."""
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 300000\nactive_file 100000\n")
    monkeypatch.setattr(train.budget, "GROUP", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    world = World(0, 2, torch.device("cpu"), launched=True)
    assert train.budget.free_memory(world) == 250_000
    (tmp_path / "memory.max").write_text("max\n")
    assert train.budget.free_memory(world) > 250_000


def test_another_policy_derives_them_anew(setting, memory, tmp_path):
    run = run_until(setting, tmp_path / "run", 3, auto_budget=True, save_steps=3)
    before = recorded(run)
    run_plain(setting, run, auto_budget=True, save_steps=3, gradient_checkpointing=True)
    assert recorded(run)["cause"] != before["cause"]
    assert recorded(run)["tokens"] > before["tokens"]


def test_what_cannot_fit_is_one_sentence(setting, memory, tmp_path):
    memory[0] = 20_000_000
    with pytest.raises(UsageError, match=r"auto_budget: a sample of .* does not fit"):
        run_plain(setting, tmp_path / "run", auto_budget=True)
    with pytest.raises(UsageError, match="auto_budget needs plan: packed"):
        run_plain(setting, tmp_path / "run", auto_budget=True, plan="samples")


def test_a_dry_run_says_them_and_leaves_nothing(setting, tmp_path, capsys):
    run = run_plain(setting, tmp_path / "run", dry_run=True, auto_budget=True)
    assert "budgets of a micro-batch: " in capsys.readouterr().out
    assert not run.exists()


@pytest.mark.slow
def test_two_ranks_have_the_same(setting, tmp_path):
    """A host's memory is shared by its ranks; a micro-batch holds no more than a rank's share."""
    run = run_ranks(setting, tmp_path / "run", 2, auto_budget=True, max_steps=2)
    limits = recorded(run)
    longest, most = limits["cause"]["largest"]
    assert limits["tokens"] <= 3 * longest and limits["patches"] <= 3 * most

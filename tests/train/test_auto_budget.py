"""`auto_budget`: micro-batches as large as the memory allows, the same again after a resume."""

import json

import pytest

import train.budget
from tests.train.runs import log_of, run_plain, run_ranks, run_until, same, weights_of
from train.config import UsageError


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


def test_two_ranks_have_the_same(setting, tmp_path):
    """A host's memory is shared by its ranks; a micro-batch holds no more than a rank's share."""
    run = run_ranks(setting, tmp_path / "run", 2, auto_budget=True, max_steps=2)
    limits = recorded(run)
    longest, most = limits["cause"]["largest"]
    assert limits["tokens"] <= 3 * longest and limits["patches"] <= 3 * most

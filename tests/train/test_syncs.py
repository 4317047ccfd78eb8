"""The host never waits for the device in a micro-step, and our code once in a step."""

import json
from collections import Counter

import pytest
import torch

import train.engine
import train.sft
from bench.reads import Reads
from tests.train.runs import run_plain

STEPS = 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16", "gradient_checkpointing": True},
        {"freeze_vit": True, "freeze_llm": True, "skip_text_only": False},
    ],
    ids=["float32", "bfloat16", "stage 1"],
)
def test_one_process(setting, tmp_path, options):
    with Reads() as reads:
        run_plain(setting, tmp_path / "run", **options)
    assert reads.micro_steps == []
    assert len(reads.steps) == STEPS  # each the one of engine.py


def test_ranks_with_zero(two_ranks):
    """DeepSpeed reads too, but only in its step."""
    for name in ("zero1", "zero2_offload", "zero2 bfloat16"):
        counted = json.loads((two_ranks / name / "reads.json").read_text())
        assert counted["micro_steps"] == []
        readers = Counter(where for where in counted["steps"] if "deepspeed/runtime" not in where)
        # of the device, and of what the ranks' CPUs summed
        assert sorted(where.split("/")[-1].split(":")[0] for where in readers) == [
            "engine.py",
            "world.py",
        ]
        assert set(readers.values()) == {STEPS}


def looked_at(loss, *_):
    if loss > 1e9:
        raise OverflowError


def filtered(_loss, losses, *_):
    losses[losses > 1]


def told(loss, *_):
    print(f"{loss.item():.3f}", end="")


@pytest.mark.parametrize("plant", [looked_at, filtered, told])
def test_a_planted_read_is_found(setting, tmp_path, monkeypatch, plant):
    honest = train.sft.cross_entropy

    def reading(*args):
        terms = honest(*args)
        plant(*terms)
        return terms

    monkeypatch.setattr(train.sft, "cross_entropy", reading)
    with Reads() as reads:
        run_plain(setting, tmp_path / "run", max_steps=1)
    assert reads.micro_steps and all(__file__ in where for where in reads.micro_steps)


def test_a_planted_read_in_a_step_is_found(setting, tmp_path, monkeypatch):
    honest = train.engine.PlainEngine.backward

    def reading(engine, loss):
        honest(engine, loss)
        torch.nonzero(engine._masters["lm_head.weight"].grad[:2])

    monkeypatch.setattr(train.engine.PlainEngine, "backward", reading)
    with Reads() as reads:
        run_plain(setting, tmp_path / "run", max_steps=1)
    assert reads.micro_steps

"""The step: many ranks, one process and an independent loop give the same numbers.

Tolerances: all runs are float32 and sum the same terms in another order. Over six steps with
rates of 1e-3 the largest difference seen is 3e-6 in a loss near 8, 2e-5 in a weight and 3e-6 of a
norm; ten times that is allowed, and a wrong denominator is a thousand times outside.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.train.runs import OPTIONS, damage, log_of, run_plain, weights_of, write_setting
from train.config import TrainConfig
from vlm.checkpoint import load_model
from vlm.data.collate import collate
from vlm.data.formats import parse_line
from vlm.data.formats.context import RowContext
from vlm.data.processor import Processor
from vlm.loss import Loss

LOSS, WEIGHT, NORM = 3e-5, 2e-4, 3e-5


def independent_loop(setting, per_sample_mean=False, bad=()):
    """The same training written out: samples one by one, plain cross entropy, torch's AdamW.
    Samples whose numbers are in `bad` are left out."""
    model = load_model(setting["model"])
    processor = Processor.from_pretrained(setting["model"])
    path = Path(setting["dataset"][0])
    lines = path.read_text().splitlines()
    samples = {
        number: processor.encode(parse_line(line, "x", RowContext(path.parent)))
        for number, line in enumerate(lines)
        if number not in bad
    }
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    size, steps, losses = OPTIONS["global_batch_size"], OPTIONS["max_steps"], []
    order = np.concatenate(
        [
            np.pad(np.random.default_rng((42, e)).permutation(16), (0, 2), constant_values=-1)
            for e in range(2)
        ]
    )
    for step in range(steps):
        chosen = [samples[n] for n in order[step * size : (step + 1) * size] if n in samples]
        count = sum(int((s.targets >= 0).sum()) for s in chosen)
        total = 0.0
        for sample in chosen:
            batch = collate([sample], model.config)
            logits = F.linear(model(batch), model.head_weight)
            loss = F.cross_entropy(logits, batch.targets, reduction="sum")
            share = len(batch.targets) * len(chosen) if per_sample_mean else count
            (loss / share).backward()
            total += loss.item() / share
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        warmup = math.ceil(0.2 * steps)
        scale = step / warmup
        if step >= warmup:
            scale = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * scale
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


def differences(run, losses, weights):
    ours = [line["loss"] for line in log_of(run)]
    saved = weights_of(run, OPTIONS["max_steps"])
    assert len(ours) == len(losses) and set(saved) == set(weights)
    worst_loss = max(abs(a - b) for a, b in zip(ours, losses, strict=True))
    return worst_loss, max((saved[n] - weights[n]).abs().max().item() for n in weights)


def test_one_process_equals_an_independent_loop(setting, plain_run):
    loss, weight = differences(plain_run, *independent_loop(setting))
    assert loss < LOSS and weight < WEIGHT
    wrong, _ = differences(plain_run, *independent_loop(setting, per_sample_mean=True))
    assert wrong > 100 * LOSS  # a wrong denominator would be seen
    for line in log_of(plain_run):
        assert line["grad_norm"] > 0.5  # clipping was active; the norms are of before it
        squares = [norm**2 for norm in line["grad_norm_by_group"].values()]
        assert len(squares) == 6 and line["grad_norm"] ** 2 == pytest.approx(sum(squares), rel=1e-4)


def test_a_sample_found_bad_at_decoding_leaves_the_mean_unbiased(tmp_path):
    """The index counted its targets; the loss must not."""
    setting = write_setting(tmp_path / "setting")
    damage(tmp_path / "setting" / "7-2.png")
    run = run_plain(setting, tmp_path / "run", max_bad_fraction=0.1)
    loss, weight = differences(run, *independent_loop(setting, bad={7}))
    assert loss < LOSS and weight < WEIGHT


def test_two_ranks_with_zero_equal_one_process(plain_run, two_rank_run):
    """Six samples a step on two ranks of two: some ranks have text alone beside images."""
    run = two_rank_run
    plain_losses = [line["loss"] for line in log_of(plain_run)]
    loss, weight = differences(run, plain_losses, weights_of(plain_run, 6))
    assert loss < LOSS and weight < WEIGHT
    for ours, theirs in zip(log_of(run), log_of(plain_run), strict=True):
        assert ours["targets"] == theirs["targets"] and ours["tokens"] == theirs["tokens"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=NORM)
        for group, norm in theirs["grad_norm_by_group"].items():
            assert ours["grad_norm_by_group"][group] == pytest.approx(norm, rel=NORM)


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_micro_batch_size_changes_nothing(setting, plain_run, tmp_path, micro_batch):
    options = {"plan": "samples", "per_device_train_batch_size": micro_batch}
    options["gradient_checkpointing"] = True
    run = run_plain(setting, tmp_path / "run", **options)
    plain_losses = [line["loss"] for line in log_of(plain_run)]
    loss, weight = differences(run, plain_losses, weights_of(plain_run, 6))
    assert loss < LOSS and weight < WEIGHT


def test_bfloat16_keeps_float32_masters(setting, tmp_path):
    """A norm's weight of 1 moves at a rate that bfloat16 alone would round away."""
    options = {"dtype": "bfloat16", "learning_rate": 5e-6, "save_steps": 3}
    run = run_plain(setting, tmp_path / "run", **options)
    from safetensors.torch import load_file

    engine = load_file(run / "checkpoint-6" / "engine" / "rank-00000.safetensors")
    name = "model.language_model.layers.0.input_layernorm.weight|master|0"
    early = load_file(run / "checkpoint-3" / "engine" / "rank-00000.safetensors")[name]
    assert engine[name].dtype == torch.float32
    moved = (engine[name] - early).abs()
    assert moved.max() > 0 and moved.max() < 1e-4
    saved = weights_of(run, 6)[name.split("|")[0]]
    assert saved.dtype == torch.bfloat16 and torch.equal(saved, engine[name].bfloat16())


def _poison(model, *_args):
    with torch.no_grad():
        model.language_model.norm.weight[0] = float("nan")


def test_steps_that_are_not_finite_are_refused_and_named(setting, tmp_path, monkeypatch, capsys):
    """Three in a row end the run, with one sentence."""
    import train.sft

    honest = train.sft.start_engine

    def poisoned(model, *args):
        _poison(model)
        return honest(model, *args)

    monkeypatch.setattr(train.sft, "start_engine", poisoned)
    config = TrainConfig(**setting, output_dir=tmp_path / "run", **OPTIONS)
    monkeypatch.setattr("train.process.parse", lambda: config)
    assert train.sft.main() == 1
    log = tmp_path / "run" / "log.jsonl"
    assert capsys.readouterr().err == f"error: 3 steps refused in a row; see {log}\n"
    lines = log_of(tmp_path / "run")
    assert [line["event"] for line in lines] == ["refused"] * 3
    assert all(len(line["samples"]) == 6 for line in lines[:2])
    assert all(":" in name for name in lines[0]["samples"])


def test_refused_step_leaves_schedule_and_weights(setting, tmp_path, monkeypatch):
    """One poisoned loss: the plan moves on, the schedule does not."""
    import train.sft

    honest, calls = train.sft.cross_entropy, []

    def sometimes(hidden, *args):
        calls.append(1)
        loss, losses, right = honest(hidden, *args)
        wrong = float("nan") if len(calls) == 9 else 1.0  # 1 is the warm-up, 3 a step
        return Loss(loss * wrong, losses * wrong, right)

    monkeypatch.setattr(train.sft, "cross_entropy", sometimes)
    run = run_plain(setting, tmp_path / "run", save_steps=1, save_total_limit=9, plan="samples")
    lines = log_of(run)
    assert [line["event"] for line in lines].count("refused") == 1
    refused = next(line["step"] for line in lines if line["event"] == "refused")
    before, after = weights_of(run, refused - 1), weights_of(run, refused)
    assert all(torch.equal(before[name], after[name]) for name in before)
    progress = json.loads((run / f"checkpoint-{refused}" / "trainer.json").read_text())
    assert progress["step"] == refused and progress["updates"] == refused - 1
    final = json.loads((run / "checkpoint-6" / "trainer.json").read_text())
    assert (final["step"], final["updates"]) == (6, 5)


def test_weights_scale_the_sum_and_not_the_denominator(setting, tmp_path):
    """Every word weighed 0.5: the first step's loss falls, though its target count does not."""
    path = Path(setting["dataset"][0])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["loss_scale"] = 0.5
    weighed = path.with_name("weighed.jsonl")
    weighed.write_text("\n".join(json.dumps(row) for row in rows))
    options = {"max_steps": 1}
    full = log_of(run_plain(setting, tmp_path / "full", **options))[0]
    half = log_of(run_plain(setting | {"dataset": [str(weighed)]}, tmp_path / "half", **options))[0]
    assert half["targets"] == full["targets"]
    assert 0.5 < half["loss"] / full["loss"] < 0.9  # words count half, ends of turns in full

"""What a run records: figures per log step, bad samples, steps without a target."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.train.runs import (
    OPTIONS,
    damage,
    log_of,
    run_plain,
    run_until,
    trainer_of,
    write_setting,
)
from train.config import TrainConfig
from train.engine import Stepped
from train.metrics import Log, read_log
from train.optim import learning_rate_scale
from train.window import Window, imbalance
from train.world import World
from vlm.checkpoint import load_model
from vlm.cost import PARTS, sample_flops
from vlm.data.collate import collate
from vlm.data.formats import parse_line
from vlm.data.formats.context import RowContext
from vlm.data.processor import Example, Processor

CPU = torch.device("cpu")
NO_ENGINE = SimpleNamespace(param_groups=[])
"""For steps of which no group is told."""


def examples_of(processor: Processor, path: Path) -> list[Example]:
    lines = path.read_text().splitlines()
    return [processor.encode(parse_line(line, "x", RowContext(path.parent))) for line in lines]


def test_a_log_line_sums_its_steps(setting, plain_run, tmp_path):
    """Two epochs of 16 samples, three steps each, in lines of three steps."""
    run = run_plain(setting, tmp_path / "run", logging_steps=3)
    lines, steps = log_of(run), log_of(plain_run)
    assert [line["step"] for line in lines] == [3, 6]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["samples"] for line in lines] == [16, 16]
    for line, part in zip(lines, (steps[:3], steps[3:]), strict=True):
        assert line["targets"] == sum(step["targets"] for step in part)
        losses = sum(step["loss"] * step["targets"] for step in part)
        assert line["loss"] == pytest.approx(losses / line["targets"])
        assert line["loss"] == pytest.approx(line["loss_by_source"]["data"])
        assert line["tokens"] == sum(step["tokens"] for step in part)
        assert line["grad_norm"] == part[-1]["grad_norm"] and line["lr"] == part[-1]["lr"]


def test_the_figures_are_those_of_the_data(setting, tmp_path):
    """Tokens, targets and useful FLOPs of one epoch against the samples one by one."""
    line = log_of(run_plain(setting, tmp_path / "run", logging_steps=3, max_steps=3))[0]
    processor = Processor.from_pretrained(setting["model"])
    samples = examples_of(processor, Path(setting["dataset"][0]))
    assert line["tokens"] == sum(sample.length for sample in samples)
    targets = [int((sample.targets >= 0).sum()) for sample in samples]
    assert line["targets"] == sum(targets)
    flops = sum(
        sample_flops(processor.config, sample.length, sample.grid_thw, count, PARTS)
        for sample, count in zip(samples, targets, strict=True)
    )
    seconds = line["samples"] / line["samples_per_second"]
    assert line["useful_tflops_per_second"] * seconds == pytest.approx(flops / 1e12, rel=0.01)
    assert 0 <= line["data_wait"] <= 1


def test_a_step_without_targets_is_skipped_and_recorded(tmp_path):
    """One sample a step, one of them cannot be decoded: the plan moves on, the schedule not."""
    setting = write_setting(tmp_path / "setting")
    damage(tmp_path / "setting" / "1-0.png")
    options = {"global_batch_size": 1, "max_steps": 16, "max_bad_fraction": 0.1}
    run = run_plain(setting, tmp_path / "run", **options)
    (skipped,) = [line for line in log_of(run) if line["event"] == "skipped"]
    assert (skipped["reason"], skipped["samples"]) == ("no targets", [])
    assert trainer_of(run, 16)["updates"] == 15
    (bad,) = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
    assert bad["id"].endswith("data.jsonl:2") and bad["found"] == "decoding"
    lines = [line for line in log_of(run) if line["event"] == "train"]
    assert skipped["step"] not in [line["step"] for line in lines]
    config = TrainConfig(**setting, output_dir=run, **OPTIONS)
    rates = [1e-3 * learning_rate_scale(update, 16, config) for update in range(15)]
    assert [line["lr"]["llm/decay"] for line in lines] == rates  # one after the other, none lost


def test_a_bad_sample_is_recorded_once_over_epochs_and_restarts(tmp_path):
    setting = write_setting(tmp_path / "setting")
    damage(tmp_path / "setting" / "6-0.png")
    options = {"max_steps": 9, "max_bad_fraction": 0.1}
    run = run_until(setting, tmp_path / "run", 4, save_steps=4, **options)
    run_plain(setting, run, **options)
    assert len((run / "ledger.jsonl").read_text().splitlines()) == 1
    samples = [line["samples"] for line in log_of(run)]
    assert sum(samples) == 3 * 15 and [sum(samples[n : n + 3]) for n in (0, 3, 6)] == [15] * 3


def log_in(folder: Path, resumed_step: int = 0, rank: int = 0, total_steps: int = 10) -> Log:
    """The log of a run whose directory is `folder`."""
    config = TrainConfig(model="model", dataset=["data"], output_dir=folder)
    return Log(config, World(rank, 2, CPU, launched=False), resumed_step, total_steps)


def figures_of_a_step() -> dict:
    """Of a window with one step of three targets, two of them right."""
    window = Window(["data"], World.start())
    with window.forward():
        pass
    window.add(Stepped([3.0, 2.0], 1.0, {}), [3, 5, 1, 1e9], [3])
    return window.figures(NO_ENGINE)


def test_steps_that_saw_no_target_have_no_loss():
    """In stage 1 those of texts alone, which are left out; a mean with zeros would be a lie."""
    unseen, window = Stepped([0.0, 0.0], 0.0, {}), Window(["data"], World.start())
    with window.forward():
        pass
    window.add(unseen, [3, 0, 0, 0], [0])
    assert not {"loss", "token_accuracy"} & set(window.figures(NO_ENGINE))
    window.add(Stepped([3.0, 2.0], 1.0, {}), [5, 5, 1, 1e9], [2])
    assert (figures := window.figures(NO_ENGINE))["loss"] == 1.5
    assert figures["token_accuracy"] == 1 and figures["targets"] == 8


def test_a_resumed_log_forgets_what_is_done_again(tmp_path):
    lines = [{"event": "start", "step": 0}, {"event": "train", "step": 4}]
    lines += [{"event": "start", "step": 6}, {"event": "train", "step": 8}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"event": "tr')
    log = log_in(tmp_path, 4)
    log.write("train", 5, loss=1.5)
    log.close()
    kept = [(line["event"], line["step"]) for line in read_log(tmp_path / "log.jsonl")]
    # what was started stays told, though the steps of it are gone
    assert kept == [("start", 0), ("train", 4), ("start", 6), ("start", 4), ("train", 5)]


def test_a_log_holds_the_name_of_any_file(tmp_path):
    log = log_in(tmp_path)
    log.write("skipped", 1, samples=["\udcff.jsonl:1", "x\x85y.jsonl:1"])
    log.close()
    log_in(tmp_path, 1).close()  # which reads it and writes it anew
    (line,) = log_of(tmp_path)
    assert line["samples"] == ["\udcff.jsonl:1", "x\x85y.jsonl:1"]


def test_only_the_first_rank_writes(tmp_path, capsys):
    log = log_in(tmp_path, rank=1)
    log.write("train", 1)
    log.train(1, 0, {})
    log.eval(1, {"loss": 1.0})
    log.say("text")
    log.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_start_says_what_runs(setting, tmp_path):
    run = run_until(setting, tmp_path / "run", 4, save_steps=4)
    run_plain(setting, run)
    first, second = log_of(run, "start")
    assert (first["step"], second["step"]) == (0, 4) and first["total_steps"] == 6
    assert first["versions"]["torch"] == torch.__version__ and first["ranks"] == 1
    assert first["command"].startswith("python ") and first["device"] == "cpu"


def test_figures_by_group(setting, plain_run):
    """Norms of the groups make up the whole one; a step's update is a small share of weights."""
    lines = log_of(plain_run)
    for line in lines:
        norms, ratios = line["grad_norm_by_group"], line["update_ratio_by_group"]
        assert set(norms) == set(ratios) == set(line["lr"]) and len(norms) > 3
        assert math.hypot(*norms.values()) == pytest.approx(line["grad_norm"], rel=1e-5)
        assert 0 < line["token_accuracy"] <= 1 or line["loss"] > 2
    assert set(lines[0]["update_ratio_by_group"].values()) == {0.0}  # the warm-up begins at 0
    assert all(0 < ratio < 1 for ratio in lines[2]["update_ratio_by_group"].values())


def test_token_accuracy_is_the_share_of_right_answers(setting, plain_run, tmp_path):
    """Of the first step, by the model that it began with."""
    (line,) = log_of(run_plain(setting, tmp_path / "run", max_steps=1, global_batch_size=16))
    model = load_model(setting["model"], torch.float32, CPU)
    processor = Processor.from_pretrained(setting["model"])
    right = targets = 0
    for example in examples_of(processor, Path(setting["dataset"][0])):
        batch = collate([example], model.config)
        chosen = (model(batch) @ model.head_weight.T).argmax(-1)
        right += int((chosen == batch.targets).sum())
        targets += len(batch.targets)
    assert line["token_accuracy"] == right / targets


def test_imbalance_is_that_of_each_micro_batch():
    """What one rank does in 3 and 1 seconds takes the other 1 and 3: each waits a third of the
    time, though both have worked as long."""
    assert imbalance(np.array([[3.0, 1.0], [1.0, 3.0]])) == pytest.approx(1 / 3)
    assert imbalance(np.array([[3.0, 1.0], [3.0, 1.0]])) == 0


def test_waits_and_rates_share_the_time(monkeypatch):
    """Ten seconds: two for data, one at the barrier, three for a checkpoint; then five more for an
    evaluation, which are no training time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    window = Window(["data"], World.start())
    for what, seconds in (("data", 2), ("ranks", 1), ("save", 3), ("eval", 5)):
        with window.waiting(what):
            now[0] += seconds
    with window.forward():
        now[0] += 4
    window.add(Stepped([3.0, 2.0], 1.0, {}), [3, 50, 10, 2e13], [3])
    figures = window.figures(NO_ENGINE)
    waits = [figures[name] for name in ("data_wait", "rank_wait", "save_wait")]
    assert figures["seconds"] == 10 and waits == [0.2, 0.1, 0.3]
    assert (figures["tokens_per_second"], figures["samples_per_second"]) == (5, 1)
    assert figures["useful_tflops_per_second"] == 2 and figures["memory_gb"] > 0


def test_mfu_is_the_share_of_all_ranks_peak_and_unknown_without_one(tmp_path, monkeypatch, capsys):
    figures = figures_of_a_step() | {"useful_tflops_per_second": 989}
    log_in(tmp_path).train(1, 0, figures)
    assert "MFU" not in capsys.readouterr().out
    monkeypatch.setattr("train.metrics.device_name", lambda _: "NVIDIA H100 80GB HBM3")
    log_in(tmp_path, 1).train(2, 0, figures)  # bfloat16 on two ranks
    assert [line["mfu"] for line in log_of(tmp_path)] == [None, 0.5]
    assert "MFU 50.0%" in capsys.readouterr().out


def test_lines_without_a_terminal_say_how_long_is_left(tmp_path, capsys):
    figures, log = figures_of_a_step(), log_in(tmp_path, resumed_step=2)
    log.train(5, 0, figures | {"seconds": 30.0})  # three steps
    log.train(6, 0, figures | {"seconds": 30.0})  # one, and four more to come
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 5/10  loss 1.0000  accuracy 0.667  norm 1.00  ")
    assert said[1].endswith("  01:00 left")
    assert [line["eta_seconds"] for line in log_of(tmp_path)] == [50, 60]

"""What a run records: figures per log step, bad samples, steps without a target."""

import json
from pathlib import Path

import pytest

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
from train.metrics import Log
from train.optim import learning_rate_scale
from vlm.cost import PARTS, sample_flops
from vlm.data.formats import parse_line
from vlm.data.formats.context import RowContext
from vlm.data.processor import Processor


def test_a_log_line_sums_its_steps(setting, plain_run, tmp_path):
    """Two epochs of 16 samples, three steps each, in lines of three steps."""
    run = run_plain(setting, tmp_path / "run", logging_steps=3)
    lines, steps = log_of(run), log_of(plain_run)
    assert [line["step"] for line in lines] == [3, 6]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["samples"] for line in lines] == [16, 16]
    for line, part in zip(lines, (steps[:3], steps[3:]), strict=True):
        assert line["loss"] == pytest.approx(sum(step["loss"] for step in part) / 3)
        assert line["targets"] == sum(step["targets"] for step in part)
        assert line["tokens"] == sum(step["tokens"] for step in part)
        assert line["grad_norm"] == part[-1]["grad_norm"] and line["lr"] == part[-1]["lr"]


def test_the_figures_are_those_of_the_data(setting, tmp_path):
    """Tokens, targets and useful FLOPs of one epoch against the samples one by one."""
    line = log_of(run_plain(setting, tmp_path / "run", logging_steps=3, max_steps=3))[0]
    processor = Processor.from_pretrained(setting["model"])
    path = Path(setting["dataset"][0])
    lines = path.read_text().splitlines()
    samples = [processor.encode(parse_line(text, "x", RowContext(path.parent))) for text in lines]
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


def test_a_resumed_log_forgets_what_is_done_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "train", "step": 4}\n{"event": "train", "step": 8}\n{"event": "tr')
    log = Log(path, 4, 10, enabled=True)
    log.write("train", 5, loss=1.5)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [4, 5]


def test_a_log_holds_the_name_of_any_file(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0, 10, enabled=True)
    log.write("skipped", 1, samples=["\udcff.jsonl:1", "x\x85y.jsonl:1"])
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == ["\udcff.jsonl:1", "x\x85y.jsonl:1"]


def test_only_the_first_rank_writes(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0, 10, enabled=False)
    log.write("train", 1)
    log.show(1, "text")
    log.say("text")
    log.close()
    assert not list(tmp_path.iterdir())

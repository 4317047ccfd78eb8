"""Trackers hold what `log.jsonl` does. Each is skipped where it is not installed."""

import shutil
import sys

import pytest

from tests.train.runs import command, launch, log_of, run_plain, run_until
from train.config import TrainConfig, UsageError
from train.trackers import check_trackers


def test_tensorboard_holds_the_log(setting, tmp_path):
    """Across a resume: the steps that are taken again are not there twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": ["tensorboard"]}
    run = run_until(setting, tmp_path / "run", 4, save_steps=2, **options)
    shutil.rmtree(run / "checkpoint-4")
    (run / "latest").write_text("checkpoint-2\n")
    run_plain(setting, run, **options)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    lines = log_of(run)
    assert len(lines) == 6
    for tag, value in (
        ("train/loss", lambda line: line["loss"]),
        ("train/loss_by_source/data", lambda line: line["loss_by_source"]["data"]),
        ("train/lr/llm/decay", lambda line: line["lr"]["llm/decay"]),
    ):
        seen = [(event.step, event.value) for event in events.Scalars(tag)]
        assert seen == [(line["step"], pytest.approx(value(line))) for line in lines]
    assert "train/mfu" not in events.Tags()["scalars"]  # which a CPU has not


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_a_run_is_tracked_offline(setting, tmp_path, tracker):
    """By the package itself, in a process of its own, whose files hold the figures."""
    pytest.importorskip(tracker)
    options = {"report_to": [tracker], "run_name": "a name", "max_steps": 2}
    offline = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
    done = launch(command(setting, tmp_path / "run", 0, **options), **offline)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = {"wandb": "wandb", "swanlab": "swanlog"}[tracker]
    stored = b"".join(p.read_bytes() for p in (tmp_path / "run" / folder).rglob("*") if p.is_file())
    assert b"train/loss_by_source/data" in stored and b"a name" in stored


def test_one_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = TrainConfig(model="x", dataset=["x"], output_dir=tmp_path, report_to=["wandb"])
    with pytest.raises(UsageError, match="wandb, which is not installed; pip install wandb"):
        check_trackers(config)

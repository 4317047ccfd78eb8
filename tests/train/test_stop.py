"""Runs that are told to save or to end: by a signal, by the clock."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.runs import (
    OPTIONS,
    ROOT,
    command,
    environment,
    launcher,
    log_of,
    run_plain,
    same,
    weights_of,
    write_config,
)
from train.config import TrainConfig
from train.state import Run
from train.stop import END, SAVE, Stop
from train.world import World

STEPS = 60
"""Enough for a run to be met on its way."""
WORKERS = {"dataloader_num_workers": 2}


@pytest.fixture(scope="module")
def uninterrupted(setting, tmp_path_factory):
    return run_plain(setting, tmp_path_factory.mktemp("long") / "run", max_steps=STEPS)


def start(command: list[str], run: Path) -> subprocess.Popen:
    """A run that has taken some steps and goes on."""
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 120
    while not (run / "log.jsonl").exists() or len(log_of(run)) < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    return process


def end_of(process: subprocess.Popen) -> int:
    """Its exit code; nothing of its session is left, and it has not failed on the way."""
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode


def stopped_at(run: Path) -> int:
    """The step of its only checkpoint, which is on the way."""
    (checkpoint,) = run.glob("checkpoint-*")
    assert (run / "latest").read_text().strip() == checkpoint.name
    step = int(checkpoint.name.split("-")[1])
    return step


def test_sigterm(setting, uninterrupted, tmp_path):
    """To all processes of the run, as a scheduler does: a checkpoint, exit code 0, and the same
    command ends as if nothing had happened."""
    run, options = tmp_path / "run", WORKERS | {"max_steps": STEPS}
    process = start(command(setting, run, 0, **options), run)
    os.killpg(process.pid, signal.SIGTERM)
    assert end_of(process) == 0
    assert 3 <= stopped_at(run) == log_of(run)[-1]["step"] < STEPS
    run_plain(setting, run, **options)
    assert same(weights_of(run, STEPS), weights_of(uninterrupted, STEPS))


def test_sigusr1_saves_and_goes_on(setting, uninterrupted, tmp_path):
    run, options = tmp_path / "run", WORKERS | {"max_steps": STEPS}
    process = start(command(setting, run, 0, **options), run)
    os.killpg(process.pid, signal.SIGUSR1)
    assert end_of(process) == 0
    assert len(list(run.glob("checkpoint-*"))) == 2
    assert same(weights_of(run, STEPS), weights_of(uninterrupted, STEPS))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_to_torchrun(setting, tmp_path, number):
    """It passes the signal on, waits, and kills: a whole checkpoint lies there by then."""
    run, options = tmp_path / "run", WORKERS | {"max_steps": 100_000}
    flags = ["--signals-to-handle", "SIGTERM,SIGUSR1", "--shutdown-timeout", "5"]
    script = [str(ROOT / "train/sft.py"), "--config", str(write_config(setting, run, **options))]
    process = start([*launcher(2), *flags, *script], run)
    process.send_signal(number)
    process.communicate(timeout=120)
    config = TrainConfig(**setting, output_dir=run, **OPTIONS | options)
    folder, progress = Run(config, World.start()).latest()
    assert (
        folder.name == f"checkpoint-{stopped_at(run)}" and len(list(folder.glob("engine/*"))) == 2
    )
    assert progress.step == stopped_at(run) >= 3


def test_a_time_limit(setting, plain_run, tmp_path):
    """The limit is over at once: one step is taken in each start."""
    run = tmp_path / "run"
    for step in (1, 2):
        run_plain(setting, run, max_hours=1e-9)
        assert (run / "latest").read_text() == f"checkpoint-{step}\n"
    run_plain(setting, run)
    assert same(weights_of(run, 6), weights_of(plain_run, 6))


@dataclass
class Writing:
    """A run, as `Stop` sees it."""

    failed: bool
    began: float = 0.0


def test_wishes():
    """Each rank's, and what their sum means; nothing is lost, and handlers are put back."""
    config = TrainConfig(model="model", dataset=["data"], output_dir=Path("run"))
    before = signal.getsignal(signal.SIGTERM)
    with Stop(config, Writing(failed=False)) as stop:
        assert stop.wish() == 0
        signal.raise_signal(signal.SIGUSR1)
        assert [stop.wish(), stop.wish()] == [SAVE, 0]
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.wish() == stop.wish() == END
    assert signal.getsignal(signal.SIGTERM) == before
    with Stop(config, Writing(failed=True)) as stop:
        assert stop.wish() == END
    assert SAVE * 100_000 < END  # no number of ranks that wish to save makes an end

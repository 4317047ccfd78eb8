"""A run that is interrupted, or loses a data worker, says so and leaves no process behind."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.runs import command, environment


@pytest.fixture
def run(setting, tmp_path):
    """A run of two data workers that has written a checkpoint and goes on."""
    out = tmp_path / "run"
    options = {"dataloader_num_workers": 2, "max_steps": 100_000, "save_steps": 3}
    process = subprocess.Popen(
        command(setting, out, 0, **options),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not (out / "latest").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


def end_of(run: subprocess.Popen) -> list[str]:
    """What it wrote last; no process of its session is left."""
    _, errors = run.communicate(timeout=60)
    # none of ours; a thread of multiprocessing may still tell of the process that is gone
    assert not re.search(r'File "[^"]*/(train|vlm)/', errors)
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
    return errors.splitlines()


def test_ctrl_c(run):
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    assert end_of(run)[-1] == "interrupted; the same command resumes from the last checkpoint"
    assert run.returncode == 130


def test_a_killed_data_worker(run):
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    assert end_of(run)[-1].startswith("error: a data worker was killed (SIGKILL)")
    assert run.returncode == 1

"""kill -9 at random moments, then the same command: it ends as an uninterrupted run does.

In float32 on CPU, with packed plans, bit for bit. One moment is in the fast tests, three are slow,
twenty are soak.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.runs import command, environment, launch, run_plain, same, weights_of
from tests.train.test_resume import engine_of, untimed
from train.checksums import flaw, read_checksums

OPTIONS = {"save_steps": 3, "dataloader_num_workers": 1}


def ends_as_uninterrupted(
    setting: dict, folder: Path, ranks: int, kills: int, seed: int, last: int, within: float
) -> None:
    """
    Args:
        ranks: 0 is plain Python.
        last: step; too far to be reached before the last kill.
        within: a run is killed at most so many seconds after its first step.
    """
    whole = finish(setting, folder / "whole", ranks, last)
    run, rng = folder / "run", random.Random(seed)
    for _ in range(kills):
        kill_somewhere(command(setting, run, ranks, **OPTIONS, max_steps=last), run, rng, within)
        check_latest(run)
    finish(setting, run, ranks, last)
    assert same(weights_of(run, last), weights_of(whole, last))
    assert same(engine_of(run, last), engine_of(whole, last))
    assert untimed(run) == untimed(whole)  # no line lost, none twice
    assert not list(run.glob("*.broken"))


def finish(setting: dict, run: Path, ranks: int, last: int) -> Path:
    if not ranks:
        return run_plain(setting, run, **OPTIONS, max_steps=last)
    done = launch(command(setting, run, ranks, **OPTIONS, max_steps=last))
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def kill_somewhere(command: list[str], run: Path, rng: random.Random, within: float) -> None:
    """Start the run, and kill one rank, a data worker or all, at any moment after its first step
    or while it writes a checkpoint."""
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begun = written(run / "config.yaml")
    process = subprocess.Popen(command, env=environment(), start_new_session=True, **nowhere)
    wait_for(process, lambda: written(run / "config.yaml") > begun)
    wait_for(process, lambda: written(run / "log.jsonl") > written(run / "config.yaml"))
    time.sleep(rng.uniform(0, within))
    if rng.random() < 0.5:
        wait_for(process, lambda: list(run.glob("checkpoint-*.partial")))
        time.sleep(rng.uniform(0, 0.05))
    ranks = children(process.pid) if "torch.distributed.run" in command else [process.pid]
    rank = rng.choice(ranks)
    {
        "a rank": lambda: os.kill(rank, signal.SIGKILL),
        "a data worker": lambda: os.kill(children(rank)[0], signal.SIGKILL),
        "all": lambda: os.killpg(process.pid, signal.SIGKILL),
    }[rng.choice(["a rank", "a data worker", "all"])]()
    assert process.wait(timeout=120) != 0


def written(path: Path) -> float:
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for(process: subprocess.Popen, sign: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not sign():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def check_latest(run: Path) -> None:
    """`latest` names a whole checkpoint, if there is one yet."""
    if (run / "latest").exists():
        folder = run / (run / "latest").read_text().strip()
        assert not [
            name for name, sums in read_checksums(folder).items() if flaw(folder, name, sums)
        ]


def test_one_moment_of_a_plain_run(setting, tmp_path):
    ends_as_uninterrupted(setting, tmp_path, 0, 1, time.time_ns(), last=30, within=0.2)


@pytest.mark.slow
def test_three_moments_of_two_ranks(setting, tmp_path):
    ends_as_uninterrupted(setting, tmp_path, 2, 3, time.time_ns(), last=300, within=1)


@pytest.mark.soak
def test_twenty_moments_of_two_ranks(setting, tmp_path):
    ends_as_uninterrupted(setting, tmp_path, 2, 20, time.time_ns(), last=1200, within=1)

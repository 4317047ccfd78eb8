"""A disk that is too small, or runs full while a checkpoint is written: one sentence, and the
checkpoint before it goes on exactly."""

import os
import resource
import shutil
import subprocess
from errno import EDQUOT, EFBIG
from pathlib import Path

import pytest

import train.snapshot
from tests.train.runs import command, launch, run_plain, run_ranks, same, weights_of
from train.config import UsageError
from train.metrics import Log
from train.state import RunError

MEGABYTES = 60
CHECKPOINT = 13
"""Megabytes of one, of the tiny model."""


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own: a tmpfs that another process has mounted for itself."""
    mount = (
        f"mount -t tmpfs -o size={MEGABYTES}m tmpfs {tmp_path} && echo mounted && exec sleep 600"
    )
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if holder.stdout.readline() != "mounted\n":
        pytest.skip(f"no disk can be mounted here: {holder.stderr.read().strip()}")
    yield Path(f"/proc/{holder.pid}/root{tmp_path}")
    holder.kill()
    holder.wait()


def fill(disk: Path, left: int) -> Path:
    """A file that leaves so many megabytes."""
    filler = disk / "filler"
    free = shutil.disk_usage(disk).free
    filler.write_bytes(bytes(free - left * 10**6))
    return filler


def test_no_room_for_one_checkpoint(setting, disk):
    fill(disk, left=CHECKPOINT - 2)
    with pytest.raises(UsageError, match=r"a checkpoint takes 0.013 GB and 0.011 GB are free on"):
        run_plain(setting, disk / "run")
    assert [path.name for path in disk.glob("run/*")] == [".lock"]  # nothing has begun


def test_no_room_for_another_one(setting, plain_run, disk):
    """Found before it is written, told by the command, and mended."""
    filler = fill(disk, left=CHECKPOINT + 5)
    options = {"save_steps": 2}
    full = launch(command(setting, disk / "run", 0, **options))
    assert full.returncode == 1
    (told,) = full.stderr.splitlines()
    assert "checkpoint-4 could not be written: a checkpoint takes 0.013 GB and" in told
    assert told.endswith("make room; the same command goes on from checkpoint-2")
    assert [path.name for path in disk.glob("run/checkpoint-*")] == ["checkpoint-2"]
    filler.unlink()
    run_plain(setting, disk / "run", **options)
    assert same(weights_of(disk / "run", 6), weights_of(plain_run, 6))


FULL = """
import os, sys
import train.snapshot
from train.sft import main

honest = train.snapshot.save_model

def fill_and_write(folder, *args):
    if folder.parent.name == "checkpoint-4.partial":
        try:
            with open(os.environ["FILLER"], "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
        except OSError:
            pass
    honest(folder, *args)

train.snapshot.save_model = fill_and_write
sys.exit(main())
"""


def test_the_disk_runs_full_during_a_write(setting, plain_run, disk, tmp_path):
    """To the last byte, so that the log finds no room either."""
    script, filler, run = tmp_path / "full.py", disk / "filler", disk / "run"
    script.write_text(FULL)
    full = launch(command(setting, run, 0, script=script, save_steps=2), FILLER=str(filler))
    assert full.returncode == 1
    (told,) = full.stderr.splitlines()
    assert "No space left on device" in told or "GB are free" in told
    assert told.endswith("the same command goes on from checkpoint-2")
    filler.unlink()
    run_plain(setting, run, save_steps=2)
    assert same(weights_of(run, 6), weights_of(plain_run, 6))


def test_a_write_breaks_off(setting, plain_run, tmp_path, monkeypatch):
    """As with a quota, which no check of the disk foresees."""
    run, honest = tmp_path / "run", train.snapshot.write_tensors
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path: Path, tensors: dict) -> None:
        if path.parts[-3] == "checkpoint-4.partial":
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, before[1]))
        honest(path, tensors)

    monkeypatch.setattr(train.snapshot, "write_tensors", limited)
    try:
        with pytest.raises(RunError, match="checkpoint-4 could not be written: File too large"):
            run_plain(setting, run, save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    run_plain(setting, run, save_steps=2)
    assert same(weights_of(run, 6), weights_of(plain_run, 6))


@pytest.mark.parametrize(
    ("event", "number", "resumes"),
    [("start", EDQUOT, "the start"), ("train", EFBIG, "checkpoint-2")],
)
def test_a_quota_is_met_by_the_log(setting, tmp_path, monkeypatch, event, number, resumes):
    honest = Log.write

    def limited(log: Log, name: str, step: int, **values) -> None:
        if name == event and step in (0, 4):
            raise OSError(number, os.strerror(number))
        honest(log, name, step, **values)

    monkeypatch.setattr(Log, "write", limited)
    told = f"run: {os.strerror(number)}; the same command goes on from {resumes}$"
    with pytest.raises(RunError, match=told):
        run_plain(setting, tmp_path / "run", save_steps=2)


LIMITED = """
import os, resource, sys
import train.snapshot
from train.sft import main

honest = train.snapshot.write_tensors

def limited(path, tensors):
    if os.environ["RANK"] == "1" and "checkpoint-4.partial" in path.parts:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    honest(path, tensors)

train.snapshot.write_tensors = limited
sys.exit(main())
"""


@pytest.mark.slow
def test_the_write_of_one_rank_breaks_off(setting, two_rank_run, tmp_path):
    """All ranks end; one of them says why."""
    run, script, options = tmp_path / "run", tmp_path / "limited.py", {"save_steps": 2}
    script.write_text(LIMITED)
    failed = launch(command(setting, run, 2, script=script, **options))
    assert failed.returncode == 1
    told = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    resumes = "the same command goes on from checkpoint-2"
    assert told == [
        f"error: {run / 'checkpoint-4'} could not be written: File too large; {resumes}"
    ]
    run_ranks(setting, run, 2, **options)
    assert same(weights_of(run, 6), weights_of(two_rank_run, 6))

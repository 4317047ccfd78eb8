"""A run's directory is one process's at a time, and the same one for all ranks."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from errno import ENOLCK

import pytest

from tests.train.runs import environment, launch, launcher, run_plain
from train.config import TrainConfig, UsageError
from train.lock import lock
from train.state import Run
from train.world import World

HOLD = """
import os, sys, time
from pathlib import Path
from train.lock import lock

held = lock(Path(sys.argv[1]))
child = os.fork()  # as a data worker is
if child:
    print(child, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `run`, and the pid of its child."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_and_changes_nothing(setting, tmp_path, holder):
    run, process = tmp_path / "run", holder[0]
    (run / "checkpoint-2.partial").mkdir()
    (run / "log.jsonl").write_text('{"event": "train", "step": 1}\n')
    with pytest.raises(UsageError, match=rf"in use by another run \(process {process.pid} on "):
        run_plain(setting, run)
    assert (run / "checkpoint-2.partial").is_dir()
    assert (run / "log.jsonl").read_text() == '{"event": "train", "step": 1}\n'


def test_a_killed_one_lets_go_though_its_worker_lives(tmp_path, holder):
    process, child = holder
    process.kill()
    process.wait()
    lock(tmp_path / "run")
    os.kill(child, 0)  # it does


def test_a_run_that_is_over_lets_go(tmp_path):
    """Though its process goes on."""
    run = Run(TrainConfig(model="m", dataset=["d"], output_dir=tmp_path), World.start())
    code = f"from pathlib import Path; from train.lock import lock; lock(Path({str(tmp_path)!r}))"
    with run.training(print):
        assert "UsageError" in launch([sys.executable, "-c", code]).stderr
    done = launch([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_args) -> None:
        raise OSError(ENOLCK, os.strerror(ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    _, mine = lock(tmp_path)
    assert mine.startswith(f"process {os.getpid()} on ")


APART = """
import json, os, sys
from pathlib import Path
from train.config import TrainConfig, UsageError
from train.state import Run
from train.world import World

def fail_on_the_second() -> None:
    if not world.first:
        raise UsageError("the second rank's")

world = World.start()
os.chdir(sys.argv[1 + world.rank])
config = TrainConfig(model="m", dataset=["d"], output_dir=Path("run"))
told = []
for work in (lambda: Run(config, world), lambda: world.together(fail_on_the_second)):
    try:
        work()
    except UsageError as error:
        told.append(str(error))
Path("told.json").write_text(json.dumps(told))
world.stop()
"""


def test_two_ranks_see_different_directories(tmp_path):
    """Of the same name, both there. What one rank finds wrong both raise."""
    script, nodes = tmp_path / "apart.py", [tmp_path / "node0", tmp_path / "node1"]
    script.write_text(APART)
    for node in nodes:
        (node / "run").mkdir(parents=True)
        (node / "run" / ".lock").write_text("an earlier run's")
    done = launch([*launcher(2), str(script), *map(str, nodes)])
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((node / "told.json").read_text()) for node in nodes]
    assert told[0] == told[1]
    assert "run on " in told[0][0] and "is not the one that the first rank sees" in told[0][0]
    assert told[0][1] == "the second rank's"

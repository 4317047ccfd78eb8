"""A rank that is killed, stopped or stuck ends the others, with one sentence that names it."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from socket import socket

import pytest

from tests.train.runs import environment, write_config

SCRIPT = Path(__file__).with_name("lost.py")
TIMEOUT = 10
"""Seconds of ddp_timeout."""


@pytest.fixture
def ranks(setting, tmp_path):
    """Starts two ranks, of which the second is lost; without a launcher, which would end the first
    by itself where it sees the second end."""
    config = write_config(setting, tmp_path / "run", ddp_timeout=TIMEOUT, max_steps=10_000)
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    where["LOCAL_WORLD_SIZE"] = "2"
    started: list[subprocess.Popen] = []

    def start(lose: str) -> list[subprocess.Popen]:
        for rank, variables in (("0", {}), ("1", {"LOSE": lose})):
            own = {"RANK": rank, "LOCAL_RANK": rank} | where | variables
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--config", str(config)],
                env=environment() | own,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("lose", "says"),
    [
        ("SIGKILL", "was killed, has ended or is stopped"),
        ("SIGSTOP", "has given no sign of life for 9 s"),
        pytest.param("sleep", "lives, but did not come to where all wait", marks=pytest.mark.slow),
    ],
)
def test_the_others_end_and_name_it(ranks, lose, says):
    first, _ = ranks(lose)
    _, errors = first.communicate(timeout=120)
    told = [line for line in errors.splitlines() if line.startswith("error:")]
    assert first.returncode == 1 and len(told) == 1, errors[-3000:]
    assert told[0].startswith(f"error: rank 1 {says}")
    assert "Traceback" not in errors

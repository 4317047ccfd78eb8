"""A process watched from outside: when each line of its log came, and the most memory it held.

The same clock and the same counter for every system, whatever it says of itself.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAUSE = 0.005
"""Seconds between two looks at the log: what a step's end may be wrong by."""
PATIENCE = 1800
"""Seconds after which a process is given up."""


class PeerError(RuntimeError):
    """A system that cannot be run or did not end well; the message has its last words."""


@dataclass(frozen=True)
class Watched:
    lines: list[dict]
    """Of its log, one for each step."""
    ended: list[float]
    """Seconds from the start of the process until each of them was there."""
    peak_bytes: int
    """Most resident memory of its largest process."""


def watch(
    command: Sequence[str], variables: Mapping[str, str], log: Path, said: Path, steps: int
) -> Watched:
    """Run a command to its end.

    Args:
        variables: added to the environment.
        log: JSON lines; those with a `loss` are steps. `said`: file for stdout and stderr.

    Raises:
        PeerError: it failed, hung, or took another number of steps than `steps`.
    """
    lines: list[dict] = []
    ended: list[float] = []
    read = 0
    with said.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter() - began
            content = log.read_bytes() if log.exists() and log.stat().st_size > read else b""
            whole = content[read : content.rfind(b"\n") + 1]
            read += len(whole)
            found = [json.loads(line) for line in whole.splitlines()]
            found = [line for line in found if "loss" in line]
            lines += found
            ended += [now] * len(found)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            if now > PATIENCE:
                raise PeerError(f"{command[0]} took more than {PATIENCE} s; see {said}")
            time.sleep(PAUSE)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode or len(lines) != steps:
        words = said.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise PeerError(
            f"{' '.join(command)} ended with {process.returncode} after {len(lines)} of {steps} "
            f"steps; it said: {words}"
        )
    return Watched(lines, ended, usage.ru_maxrss * 1024)

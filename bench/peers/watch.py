"""A process watched from outside: when its log's lines came, what it computed, the memory it held.

The same clock and the same counter for every system, whatever it says of itself.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAUSE = 0.005
"""Seconds between two looks at the log: what a step's end may be wrong by."""
LOOK = 0.5
"""Seconds between two looks at the memory; the kernel keeps its peak."""
PROCESSES = Path("/proc")
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
    computed: list[float]
    """Seconds of processor time until then, of the process and its descendants."""
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
    computed: list[float] = []
    read = peak = 0
    looked = 0.0
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
            ended_with = process.poll()
            now = time.perf_counter() - began
            content = log.read_bytes() if log.exists() and log.stat().st_size > read else b""
            whole = content[read : content.rfind(b"\n") + 1]
            read += len(whole)
            found = [json.loads(line) for line in whole.splitlines()]
            found = [line for line in found if "loss" in line]
            lines += found
            ended += [now] * len(found)
            if found:
                computed += [cpu_seconds(process.pid)] * len(found)
            if ended_with is not None:
                break
            if found or now > looked + LOOK:
                peak, looked = max(peak, peak_of_tree(process.pid)), now
            if now > PATIENCE:
                raise PeerError(f"{command[0]} took more than {PATIENCE} s")
            time.sleep(PAUSE)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if ended_with or len(lines) != steps:
        words = said.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise PeerError(
            f"{' '.join(command)} ended with {ended_with} after {len(lines)} of {steps} "
            f"steps; it said: {words}"
        )
    return Watched(lines, ended, computed, peak)


def peak_of_tree(pid: int) -> int:
    """Bytes: the most resident memory so far of a process or of one of its descendants.

    `getrusage` will not do: to a child it adds what its parent held when it was forked.
    """
    try:
        status = (PROCESSES / str(pid) / "status").read_text()
        children = children_of(pid)
    except OSError:  # it has ended
        return 0
    own = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return max([int(own[1]) * 1024 if own else 0, *(peak_of_tree(c) for c in children)])


def cpu_seconds(pid: int) -> float:
    """That a process and its descendants have computed, ended ones included."""
    try:
        # a name in brackets, which may hold anything, and then the third field
        fields = (PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
        children = children_of(pid)
    except OSError:
        return 0.0
    ticks = sum(map(int, fields[11:15]))  # its own, and those of children waited for
    return ticks / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children))


def children_of(pid: int) -> list[int]:
    """OSError where it has ended."""
    tasks = (PROCESSES / str(pid) / "task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]

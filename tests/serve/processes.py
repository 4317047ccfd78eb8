"""The processes of a group, and launchers as their users start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 60


def pids(group: int) -> list[int]:
    """The group's processes that are more than a zombie."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = (folder / "stat").read_text().rpartition(")")[2]
            state, _parent, its_group = stat.split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(folder.name))
    return found


def command_line(pid: int) -> str:
    """As `ps` shows it; empty for a process that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return line.replace(b"\0", b" ").decode(errors="replace")
    return ""


def living(group: int) -> list[str]:
    """Command lines of the group's processes."""
    return [command_line(pid) for pid in pids(group)]


def shared_memory(group: int) -> set[Path]:
    """Files in /dev/shm that the group's processes have open."""
    found = set()
    for pid in pids(group):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/maps").read_text().split()
            found |= {Path(word) for word in words if word.startswith("/dev/shm/")}
    return found


def command_lines() -> str:
    """Those of every process on the machine."""
    return "\n".join(command_line(int(p.name)) for p in Path("/proc").glob("[0-9]*"))


def wait_until(happened: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether it happened in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.05)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launcher:
    """`python serve/launch.py ...` with its output in a file."""

    def __init__(self, output: Path, *arguments: object, **variables: str) -> None:
        self.output = output
        script = str(ROOT / "serve" / "launch.py")
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, script, *map(str, arguments)],
                env=os.environ | variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=output.parent,
            )

    def said(self, words: str) -> bool:
        return words in self.output.read_text()

    def until(self, words: str, seconds: float = PATIENCE) -> None:
        """Wait for words in its output."""
        wait_until(lambda: self.said(words) or self.process.poll() is not None, seconds)
        assert self.said(words), self.output.read_text()

    def send(self, number: signal.Signals) -> int:
        """Send a signal; the exit code that follows."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def group(self) -> int:
        """The group of its vLLM, which is the id of the guard."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return os.getpgid(int(children[0]))


def group_of(record: Path) -> int:
    assert wait_until(record.exists)
    return json.loads(record.read_text())["group"]


# --- the command ---------------------------------------------------------------------------------

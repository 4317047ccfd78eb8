"""Runs vLLM so that nothing of it outlives its launcher.

    python serve/guard.py SECONDS COMMAND ...

serve/launch.py starts this process, which starts the command in a process group of its own and
ends with its exit code. The command is stopped when this process gets SIGTERM and when its
standard input ends, which the kernel sees to however the launcher dies. It gets SIGTERM, SECONDS
to end by itself, and then whatever is left of its group is killed.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

POLL_SECONDS = 0.2
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def run(command: list[str], grace: float) -> int:
    """Run `command` until it ends or is to stop; returns its exit code."""
    stopping = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    # Orphans of the group become children of this process, which can then wait for their end.
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        process_group=0,
        # should this very process be killed, the command is told to stop
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    while child.poll() is None and not stopping:
        launcher_is_gone, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        stopping = stopping or bool(launcher_is_gone)
    child.terminate()  # the server's own process, which stops its engines in order
    with suppress(subprocess.TimeoutExpired):
        child.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-child.pid, 0)
    return code


def _prctl(option: int, value: int) -> None:
    """Linux's prctl; nothing elsewhere."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(option, value)


if __name__ == "__main__":
    code = run(sys.argv[2:], float(sys.argv[1]))
    sys.exit(code if code >= 0 else 128 - code)

"""Sees to it that vLLM ends when its launcher is killed: serve/launch.py starts this process first.

It leads the process group that vLLM then joins, and reads on its standard input the id of vLLM's
server, and then nothing, until the kernel closes the pipe because the launcher is dead. Then the
server is told to end and has the seconds of this script's argument for it. What is left of the
group after that is told too, and killed.
"""

import os
import signal
import sys
import time
from contextlib import suppress

POLL_SECONDS = 0.1
ORPHANS_SECONDS = 5.0
"""Engines whose server is gone get this long, and so does Python's resource tracker, which then
removes their shared memory."""


def main(grace: float) -> None:
    server = int(sys.stdin.read() or 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if server:
        end = time.monotonic() + grace
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGTERM)
            while time.monotonic() < end:
                os.kill(server, 0)
                time.sleep(POLL_SECONDS)
            os.kill(server, signal.SIGKILL)
    os.killpg(0, signal.SIGTERM)
    time.sleep(ORPHANS_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]))

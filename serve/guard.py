"""Sees to it that vLLM ends when its launcher is killed: serve/launch.py starts this process first.

It leads the process group that vLLM then joins, and reads on its standard input the id of vLLM's
server, and then nothing, until the kernel closes the pipe because the launcher is dead. Then the
server is told to end, has the seconds of this script's argument for it, and the group is killed.
"""

import os
import signal
import sys
import time
from contextlib import suppress

POLL_SECONDS = 0.1


def main(grace: float) -> None:
    server = int(sys.stdin.read() or 0)
    end = time.monotonic() + grace
    with suppress(ProcessLookupError):
        if server:
            os.kill(server, signal.SIGTERM)
        while server and time.monotonic() < end:
            os.kill(server, 0)
            time.sleep(POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]))

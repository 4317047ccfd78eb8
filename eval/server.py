"""A server for the length of a run: `serve/launch.py` as a process of its own."""

import ctypes
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eval.result import EvalError

LAUNCHER = Path(__file__).parents[1] / "serve" / "launch.py"
POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1


@contextmanager
def serving(export: Path, name: str) -> Iterator[tuple[str, str]]:
    """(base URL, model's name) of a server that answers; it is stopped afterwards.

    Raises:
        EvalError: it ended before it answered; its own words are above.
    """
    port = _free_port()
    flags = ["--port", str(port), "--served_model_name", name]
    process = subprocess.Popen(
        [sys.executable, str(LAUNCHER), str(export), *flags],
        preexec_fn=_end_with_parent,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(url):
            if process.poll() is not None:
                raise EvalError(f"{export} could not be served (see above)")
            time.sleep(POLL_SECONDS)
        yield f"{url}/v1", name
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _end_with_parent() -> None:
    """Should this process be killed, the launcher gets SIGTERM; Linux alone knows how."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False

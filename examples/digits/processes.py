"""The project's own commands, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2


def start(*arguments: object, threads: int = RANKS) -> subprocess.Popen:
    """A Python process of the project, in its root."""
    command = [sys.executable, *map(str, arguments)]
    print("$ python " + " ".join(map(_shown, command[1:])), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment["PYTHONWARNINGS"] = "ignore"
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def run(*arguments: object, threads: int = RANKS) -> None:
    """The same, waited for; its failure ends the demo."""
    code = start(*arguments, threads=threads).wait()
    if code:
        raise SystemExit(f"the command above ended with code {code}; the demo stops here")


def _shown(argument: str) -> str:
    return repr(argument) if " " in argument or "\n" in argument else argument

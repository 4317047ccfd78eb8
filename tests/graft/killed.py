"""Builds that are killed at every moment at which a file is opened, renamed or removed.

    python tests/graft/killed.py VISION LLM FOLDER STRIDE

A hook of the interpreter sends SIGKILL to a forked build at the n-th such moment, for n = 0,
STRIDE, ... and for every rename and removal; the build is then run again. Prints one JSON object
for each: what was left, and what became of it.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from vlm.graft.options import BuildOptions
from vlm.graft.stream import build

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
OPTIONS = BuildOptions(seed=3, dtype="bfloat16", max_shard_size=400_000)
moments: list[str] = []
kill_at: int | None = None


def note(event: str, arguments: tuple) -> None:
    if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        return
    if threading.current_thread() is not threading.main_thread():
        return
    path = str(arguments[0])
    if "/hybrid" in path or path.endswith(".safetensors"):
        if len(moments) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        moments.append(f"{event} {Path(path).name}")


def run(vision: Path, llm: Path, out: Path, moment: int | None) -> int:
    """The wait status of a build in a process of its own."""
    global kill_at
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    kill_at = moment
    moments.clear()
    build(vision, llm, out, OPTIONS)
    os._exit(0)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def main(vision: Path, llm: Path, folder: Path, stride: int) -> None:
    whole = folder / "whole" / "hybrid"
    whole.parent.mkdir(parents=True)
    build(vision, llm, whole, OPTIONS)  # not forked: what torch does once is done for the others
    names = list(moments)  # before `contents`, which opens files too
    expected = contents(whole)
    for moment, name in enumerate(names):
        if moment % stride and name.startswith("open"):
            continue
        out = folder / f"{moment}" / "hybrid"
        out.parent.mkdir()
        partial = out.with_name("hybrid.partial")
        status = run(vision, llm, out, moment)
        killed = {
            "moment": name,
            "signal": os.WTERMSIG(status),
            "final": out.exists(),
            "loadable": (partial / "config.json").exists(),
            "shards": len(list(partial.glob("*.safetensors"))),
            "begun": sum(p.stat().st_size for p in partial.glob("*.part")),
        }
        if killed["final"]:
            print(json.dumps(killed | {"equal": contents(out) == expected}))
            continue
        before = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.safetensors")}
        again = run(vision, llm, out, None)
        reused = sum((out / file).stat().st_mtime_ns == time for file, time in before.items())
        left = sorted(p.name for p in out.parent.iterdir())
        equal = contents(out) == expected
        print(json.dumps(killed | {"again": again, "reused": reused, "left": left, "equal": equal}))


if __name__ == "__main__":
    sys.addaudithook(note)
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))

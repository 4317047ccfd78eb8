"""What the scripts of bench/ share: one way to measure, one form of a result, one command line.

Times are compared inside one run: what is compared takes turns, each round from another one on, and
figures are medians of at least five rounds with the least and the most beside them. A result is
`bench/results/<name>.json` with the keys of `write_result`; `python -m bench.table` makes
`bench/README.md` of them all.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from vlm.checkpoint import write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
GOLDEN_MODEL = ROOT / "tests" / "golden" / "model"
"""A tiny Qwen2.5-VL with tokenizer, template and processor settings."""
ROUNDS = 5
"""The fewest of which a median is told."""


def arguments(name: str, doc: str) -> argparse.ArgumentParser:
    """The command line of `bench/<name>.py`: `--quick` and `--out`, to which a script adds its own.

    Args:
        doc: the script's docstring, shown by `--help`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes: shows that it runs, no figures"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the result; default: a file of bench/results, and with --quick none",
    )
    return parser


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """That `work` takes, by `clock`; on a GPU until the device has done it."""
    began = clock()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - began


def interleaved(rounds: int, measures: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each measure returns in each round; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            found[name].append(measures[name]())
    return found


def summary(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most."""
    values = sorted(values)
    found = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
    return {name: round(value, digits) for name, value in found.items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """`summary` of the quotients, round by round."""
    return summary(a / b for a, b in zip(above, below, strict=True))


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes of tensors that `work` allocates: those that its result keeps, and the most at any
    time. On a GPU as its allocator counts them, else as torch's profiler does."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        held = torch.cuda.memory_allocated() - before
        del result
        return held, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = profiler.profiler.kineto_results.events()
    del result
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


def machine() -> str:
    """The GPU if there is one, the processor, cores, memory, and how busy the machine is."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = next(iter(models), "") or platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts += [f"{platform.machine()} {name}".strip(), f"{os.cpu_count()} cores"]
    parts += [f"{memory:.0f} GB of memory", f"load {os.getloadavg()[0]:.1f}"]
    return ", ".join(parts)


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of torch and of other distributions."""
    names = ("torch", *packages)
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def result_path(name: str, options: argparse.Namespace) -> Path | None:
    """Where the command line puts a result, in a folder that exists; None for nowhere."""
    path = options.out or (None if options.quick else RESULTS / f"{name}.json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_result(
    name: str,
    options: argparse.Namespace,
    *,
    what: str,
    target: Mapping[str, str],
    figures: Any,
    spread: str,
    refuted_by: str,
    kind: Literal["measured", "derived"] = "measured",
    packages: Sequence[str] = (),
) -> None:
    """Write a result where the command line (`arguments`) says.

    Args:
        what: the quantity, and the setting that it was found in.
        target: what is aimed at -> the bound; empty where nothing was set.
        figures: whatever the script found, for people and for `bench/table.py`.
        spread: what the range beside a median is of.
        kind: measured, or derived from a count.
        refuted_by: the experiment that would show the figure to be wrong.
        packages: distributions besides torch whose versions matter.
    """
    path = result_path(name, options)
    if path is None:
        return
    write_json(
        path,
        {
            "name": name,
            "what": what,
            "target": dict(target),
            "figures": figures,
            "spread": spread,
            "kind": kind,
            "machine": machine(),
            "versions": versions(*packages),
            "date": date.today().isoformat(),
            "refuted_by": refuted_by,
        },
    )


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of the same keys, the keys above them."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        pairs = zip(row, widths, strict=True)
        first, *others = (f"{cell:>{width}}" for cell, width in pairs)
        print("  ".join([f"{first.strip():{widths[0]}}", *others]))


def _cell(value: object) -> str:
    if isinstance(value, Mapping):  # a summary
        return f"{_cell(value['median'])} ({_cell(value['least'])}..{_cell(value['most'])})"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

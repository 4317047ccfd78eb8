"""The figures of a comparison: medians and spreads, tables and the JSON file."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path

from bench.peers.setting import GLOBAL_BATCH, SCALE, Setting
from bench.peers.systems import PEERS_PYTHON, REFERENCE, SYSTEMS, WORKERS
from bench.peers.watch import Watched

TARGETS = {"ms-swift": 3.0, "transformers": 2.0}
"""Times as many samples a second as theirs, in both stages."""


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    samples_per_second: float
    tokens_per_second: float
    peak_gb: float
    start_up_seconds: float


def figures_of(watched: Watched, setting: Setting) -> Figures:
    """From the clock outside: the steps after the warm-up."""
    seconds = watched.ended[-1] - watched.ended[setting.warm_up - 1]
    return Figures(
        samples_per_second=setting.samples / seconds,
        tokens_per_second=setting.tokens / seconds,
        peak_gb=watched.peak_bytes / 1e9,
        start_up_seconds=watched.ended[0] - seconds / setting.steps,
    )


def summary(values: Iterable[float]) -> dict:
    values = sorted(values)
    return {
        "median": round(statistics.median(values), 3),
        "least": round(values[0], 3),
        "most": round(values[-1], 3),
    }


def table(speeds: dict[tuple[int, str], list[Figures]]) -> list[dict]:
    """A row for each stage and system; `times` is ours / theirs, round by round."""
    rows = []
    for (stage, name), rounds in speeds.items():
        row: dict = {"stage": stage, "system": name}
        for field in fields(Figures):
            row[field.name] = summary(getattr(figures, field.name) for figures in rounds)
        if ours := speeds.get((stage, REFERENCE)):
            pairs = zip(ours, rounds, strict=True)
            row["times"] = summary(a.samples_per_second / b.samples_per_second for a, b in pairs)
        rows.append(row)
    return rows


def print_gradients(rows: list[dict]) -> None:
    print("gradients of one step against ours: |difference| / |ours| by part, and the loss")
    for row in rows:
        shape = f"{GLOBAL_BATCH // row['micro_batch']} x {row['micro_batch']}"
        parts = ", ".join(f"{k} {v:.1e}" for k, v in row["relative_difference"].items())
        print(
            f"stage {row['stage']}  {row['system']:18} {shape:>7}  {parts:42}"
            f"  loss {row['loss']:.6f} (ours {row['loss_of_ours']:.6f})"
        )


def print_speeds(speeds: dict[tuple[int, str], list[Figures]]) -> None:
    print(
        f"{'stage':5} {'system':18} {'samples/s':>9} {'(of rounds)':>15} {'tokens/s':>8}"
        f" {'peak GB':>7} {'start-up s':>10} {'ours is':>8} {'(of rounds)':>15}"
    )
    for row in table(speeds):
        rate, times = row["samples_per_second"], row.get("times")
        ratio = f"{times['median']:7.2f}x {_range(times):>15}" if times else ""
        print(
            f"{row['stage']:5} {row['system']:18} {rate['median']:9.2f} {_range(rate):>15}"
            f" {row['tokens_per_second']['median']:8.0f} {row['peak_gb']['median']:7.2f}"
            f" {row['start_up_seconds']['median']:10.1f} {ratio}"
        )


def _range(found: dict) -> str:
    return f"{found['least']:.2f}..{found['most']:.2f}"


def write_result(
    path: Path,
    options: argparse.Namespace,
    setting: Setting,
    gradients: list[dict],
    speeds: dict[tuple[int, str], list[Figures]],
) -> None:
    """The file of bench/results."""
    rows = table(speeds)
    result = {
        "name": "peers",
        "what": f"{setting.steps} steps of {GLOBAL_BATCH} samples on {options.threads} threads, "
        f"float32, lengths 1/{SCALE} of bench/lengths/instruction.npz",
        "target": {
            name: f">= {times:g}x samples/s, both stages" for name, times in TARGETS.items()
        },
        "figures": {
            "systems": {name: SYSTEMS[name].what for name in options.systems},
            "gradients": gradients,
            "speeds": rows,
        },
        "spread": f"least and most of {options.rounds} interleaved rounds",
        "kind": "measured",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "date": date.today().isoformat(),
        "refuted_by": "python -m bench.peers on an idle machine with ratios below the targets, or "
        "with a gradient of one micro-batch that differs by more than 1e-4",
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

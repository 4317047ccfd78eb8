"""The figures of a comparison: medians and spreads, tables and the JSON file."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import distributions, version

from bench.peers.setting import GLOBAL_BATCH, SCALE, Setting
from bench.peers.systems import PEERS_PYTHON, REFERENCE, SYSTEMS
from bench.peers.watch import Watched

TARGETS = {"ms-swift": 3.0, "transformers": 2.0}
"""Times as many samples a second as theirs, in both stages, on the tiny model."""


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    samples_per_second: float
    tokens_per_second: float
    peak_gb: float
    start_up_seconds: float


def figures_of(watched: Watched, setting: Setting) -> Figures:
    """From the clock outside: of the steps after the warm-up."""
    seconds = watched.ended[-1] - watched.ended[setting.warm_up - 1]
    return Figures(
        samples_per_second=setting.samples / seconds,
        tokens_per_second=setting.tokens / seconds,
        peak_gb=watched.peak_bytes / 1e9,
        start_up_seconds=watched.ended[0] - seconds / setting.steps,
    )


def summary(values: Iterable[float]) -> dict[str, float]:
    values = sorted(values)
    return {
        "median": round(statistics.median(values), 3),
        "least": round(values[0], 3),
        "most": round(values[-1], 3),
    }


def table(found: Mapping[tuple[int, str], Sequence[Figures]]) -> list[dict]:
    """A row for each stage and system.

    `times` is how many times as many samples a second ours trains, round by round.
    """
    rows = []
    for (stage, name), rounds in found.items():
        row: dict = {"stage": stage, "system": name}
        for field in fields(Figures):
            row[field.name] = summary(getattr(figures, field.name) for figures in rounds)
        if ours := found.get((stage, REFERENCE)):
            pairs = zip(ours, rounds, strict=True)
            row["times"] = summary(a.samples_per_second / b.samples_per_second for a, b in pairs)
        rows.append(row)
    return rows


def print_gradients(size: str, rows: Sequence[dict]) -> None:
    print(f"{size}: gradient of one step against ours, |difference| / |ours| by part")
    for row in rows:
        shape = f"{GLOBAL_BATCH // row['micro_batch']} x {row['micro_batch']}"
        parts = ", ".join(f"{part} {x:.1e}" for part, x in row["relative_difference"].items())
        print(f"stage {row['stage']}  {row['system']:18} {shape:>7}  {parts}")


def print_speeds(size: str, rows: Sequence[dict]) -> None:
    print(
        f"{size:5} {'system':18} {'samples/s':>9} {'(of rounds)':>13} {'tokens/s':>8}"
        f" {'peak GB':>7} {'start-up s':>10} {'ours is':>8} {'(of rounds)':>13}"
    )
    for row in rows:
        rate, times = row["samples_per_second"], row.get("times")
        ratio = f"{times['median']:7.2f}x {_range(times):>13}" if times else ""
        print(
            f"{row['stage']:5} {row['system']:18} {rate['median']:9.2f} {_range(rate):>13}"
            f" {row['tokens_per_second']['median']:8.0f} {row['peak_gb']['median']:7.2f}"
            f" {row['start_up_seconds']['median']:10.1f} {ratio}"
        )


def _of_peers() -> dict[str, str]:
    """ms-swift's version, where it is installed."""
    folders = PEERS_PYTHON.parents[1].glob("lib/python*/site-packages")
    found = distributions(name="ms-swift", path=[str(folder) for folder in folders])
    return {one.name: one.version for one in found}


def _range(found: dict[str, float]) -> str:
    return f"{found['least']:.2f}..{found['most']:.2f}"


def write_result(
    options: argparse.Namespace,
    gradients: Sequence[dict],
    speeds: Sequence[dict],
    work: Sequence[dict],
) -> None:
    """The JSON file that `--out` names."""
    targets = {name: f">= {times:g}x, both stages, tiny" for name, times in TARGETS.items()}
    result = {
        "name": "peers",
        "what": "samples a second of training, ours / theirs, the same samples in every step: "
        f"{options.steps} steps of {GLOBAL_BATCH} after {options.warm_up} of warm-up, float32 on a "
        f"CPU, {options.threads} threads, lengths 1/{SCALE} of bench/lengths/instruction.npz",
        "target": targets,
        "figures": {
            "systems": {name: SYSTEMS[name].what for name in options.systems},
            "gradients": list(gradients),
            "speeds": list(speeds),
            "flops_with_the_recipes_flags_over_useful (derived)": list(work),
        },
        "spread": f"least and most of {options.rounds} interleaved rounds",
        "kind": "measured",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")} | _of_peers(),
        "date": date.today().isoformat(),
        "refuted_by": "python -m bench.peers on an idle machine: a smaller ratio, or a gradient of "
        "one micro-batch that differs by more than 1e-4",
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

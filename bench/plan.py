"""Plans over recorded lengths: fill, balance, waiting of ranks, and the planner's own time.

    python bench/plan.py                # a table, and bench/results/plan.json

An epoch of each file of bench/lengths (`make_lengths.py` says how they were made) is arranged for
8 and 64 ranks, 16 samples a rank and step as in the recipe, in three ways:

- naive: samples dealt to the ranks in turn, two in a micro-batch, as a distributed sampler does;
- samples: two in a micro-batch, balanced by cost;
- packed: the default.

Fewest is how many micro-batches a rank the budgets ask for at least. Balance is FLOPs of the mean
rank / of the slowest; waiting is the mean rank's share of time where ranks meet in every
micro-batch, as ZeRO-2's do. The planning time is of a million samples drawn from the file: every
global batch of an epoch, arranged, on one core.
"""

import json
import platform
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlm.data.pack import Budget
from vlm.data.plan import Plan, Position
from vlm.data.plan_report import report, summarise

HERE = Path(__file__).parent
WORLDS = (8, 64)
PER_RANK = 16
"""Samples of a rank in a step: the recipe's 2 x 8."""
MILLION = 1_000_000


def plan_of(name: str, world: int, mode: str, samples: int | None = None) -> Plan:
    """A plan over a recorded file, or over `samples` drawn from it."""
    with np.load(HERE / "lengths" / f"{name}.npz") as file:
        columns = {column: file[column] for column in ("lengths", "patches", "targets", "costs")}
    if samples:
        drawn = np.random.default_rng(42).integers(len(columns["lengths"]), size=samples)
        columns = {name: column[drawn] for name, column in columns.items()}
    return Plan(
        **columns,
        counts=(len(columns["lengths"]),),
        weights=(1.0,),
        global_batch_size=PER_RANK * world,
        seed=42,
        world=world,
        budget=Budget(mode),
    )


def naive(plan: Plan) -> list[list[list[list[int]]]]:
    """All steps of an epoch, dealt in turn."""
    steps = []
    for batch in range(plan.steps_per_epoch):
        samples = plan.samples(Position(0, batch)).tolist()
        ranks = [samples[rank :: plan.world] for rank in range(plan.world)]
        longest = max(map(len, ranks))
        size = plan.budget.samples
        steps.append([[rank[j : j + size] for j in range(0, longest, size)] for rank in ranks])
    return steps


def planning_seconds(plan: Plan) -> float:
    """CPU time for the arrangement of a whole epoch."""
    began = time.process_time()
    for batch in range(plan.steps_per_epoch):
        plan.ranks(Position(0, batch))
    return time.process_time() - began


def main() -> None:
    rows = []
    print(f"{'data':12} {'ranks':>5} {'plan':8} {'micro-batches':>13} {'fewest':>6} {'fill':>9}"
          f" {'tokens':>7} {'patches':>7} {'balance':>9} {'waiting':>8}"
          f" {'1 M samples':>11}")  # fmt: skip
    for name in ("caption", "instruction"):
        for world in WORLDS:
            for kind in ("naive", "samples", "packed"):
                plan = plan_of(name, world, "packed" if kind == "packed" else "samples")
                found = summarise(plan, naive(plan)) if kind == "naive" else report(plan)
                row = {"data": name, "ranks": world, "plan": kind, **asdict(found)}
                seconds = ""
                if kind == "packed":
                    million = plan_of(name, world, "packed", MILLION)
                    row["seconds_per_million"] = round(planning_seconds(million), 1)
                    seconds = f"{row['seconds_per_million']} s"
                rows.append(row)
                print(f"{name:12} {world:5} {kind:8} {found.micro_batches:13.2f}"
                      f" {found.fewest_micro_batches:6.2f} {found.fill:9.3%}"
                      f" {found.token_use:7.1%} {found.patch_use:7.1%} {found.balance:9.2%}"
                      f" {found.waiting:8.2%} {seconds:>11}")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB")
    result = {"machine": platform.processor() or platform.machine(), "peak_gib": round(peak, 2)}
    text = json.dumps(result | {"rows": rows}, indent=1)
    (HERE / "results" / "plan.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

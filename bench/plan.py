"""Plans over recorded lengths: fill, balance, waiting of ranks, and the planner's own time.

    python -m bench.plan

An epoch of each file of bench/lengths (`make_lengths.py` says how they were made) is arranged for
8 and 64 ranks, 16 samples a rank and step as in the recipe, in three ways:

- naive: samples dealt to the ranks in turn, two in a micro-batch, as a distributed sampler does,
  padded to the longer one;
- samples: two in a micro-batch, balanced by cost;
- packed: the default.

Fill is the share of real tokens and patches in what is computed. A packed plan computes nothing
else but a dummy image where there is none, whatever it packs, so that two more figures say how well
it packs: the use of both budgets, and full packing, the fewest micro-batches that the budgets allow
over those that there are. Balance is FLOPs of the mean
rank / of the slowest; waiting is the mean rank's share of time where ranks meet in every
micro-batch, as ZeRO-2's do. The planning time is of a million samples drawn from the file: every
global batch of an epoch, arranged, on one core.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from bench.common import arguments, print_table, seconds, write_result
from bench.make_lengths import FOLDER
from vlm.data.pack import Budget
from vlm.data.plan import Plan, Position
from vlm.data.plan_report import report, summarise

FILES = ("caption", "instruction")
WORLDS = (8, 64)
PER_RANK = 16
"""Samples of a rank in a step: the recipe's 2 x 8."""
MILLION = 1_000_000
TARGETS = {
    "fill of packed micro-batches": ">= 99.5 %",
    "balance over ranks": ">= 99 % at 8 and 64 ranks",
    "waiting of ranks": "<= 1 %",
    "planning a million samples": "< 30 s on one core, < 2 GB",
}


def plan_of(name: str, world: int, mode: str, samples: int | None = None) -> Plan:
    """A plan over a recorded file, or over `samples` drawn from it."""
    with np.load(FOLDER / f"{name}.npz") as file:
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

    def arrange() -> None:
        for batch in range(plan.steps_per_epoch):
            plan.ranks(Position(0, batch))

    return seconds(arrange, time.process_time)


def figures_of(name: str, world: int, kind: str, million: int) -> dict:
    plan = plan_of(name, world, "packed" if kind == "packed" else "samples")
    found = summarise(plan, naive(plan), padded=True) if kind == "naive" else report(plan)
    row = {"data": name, "ranks": world, "plan": kind, **asdict(found)}
    row["full_packing"] = found.fewest_micro_batches / found.micro_batches
    if kind == "packed":
        taken = planning_seconds(plan_of(name, world, "packed", million))
        row["seconds_per_million"] = round(taken * MILLION / million, 1)
    return row


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("plan", __doc__).parse_args(given)
    million, worlds = (5000, WORLDS[:1]) if options.quick else (MILLION, WORLDS)
    rows = [
        figures_of(name, world, kind, million)
        for name in FILES[: 1 if options.quick else None]
        for world in worlds
        for kind in ("naive", "samples", "packed")
    ]
    shown = ("data", "ranks", "plan", "micro_batches", "fewest_micro_batches", "full_packing")
    shown += ("fill", "token_use", "patch_use", "balance", "waiting", "seconds_per_million")
    print_table([{name: row.get(name, "") for name in shown} for row in rows])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB")
    write_result(
        "plan",
        options,
        what="epochs of both files of bench/lengths, 16 samples a rank and step, arranged for "
        "8 and 64 ranks; CPU seconds that one core takes to arrange an epoch of a million",
        target=TARGETS,
        figures={"peak_gib": round(peak, 2), "rows": rows},
        spread="none: a plan is the same in every run; of the seconds one run each",
        kind="derived",
        refuted_by="python -m bench.plan: another share, or a longer time on an idle machine; for "
        "the waiting, ranks that wait longer in a run on GPUs",
        packages=("numpy",),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

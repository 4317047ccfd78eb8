"""ms-swift, transformers and this project on the same tiny model and data, both stages, on a CPU.

    python -m bench.peers                        # two tables, and bench/results/peers.json
    python -m bench.peers --quick --systems transformers ours    # a look, no figures

First every system takes one step over the same samples, and its gradient is compared with ours.
Then each trains the same samples in the same steps, in a process of its own with as many threads
as the others; in every round they take turns. A rate is of the steps after the warm-up. Start-up is
the time from the start of the process to the end of its first step, less a mean step. Memory is
the resident memory of the largest process. `make peers` installs ms-swift beside our environment.
Where a target is missed, the result says why: how much less there is to compute, how fast it is
computed, and where our steps' time goes by `train/sft.py --profile`.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.common import ROUNDS, write_result
from bench.common import arguments as common_arguments
from bench.peers.gradients import Gradients, compare, gradients_of_ours, gradients_of_peer
from bench.peers.profile import peak_flops, shares
from bench.peers.results import (
    TARGETS,
    described,
    figures_of,
    misses,
    print_gradients,
    print_speeds,
    table,
    work_row,
)
from bench.peers.setting import GLOBAL_BATCH, SCALE, SIZES, Setting, write_setting
from bench.peers.systems import REFERENCE, SYSTEMS, Job, Start, System, environment, start_ours
from bench.peers.watch import PeerError, Watched, watch
from bench.peers.work import work


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_arguments("peers", __doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="in each all systems run once")
    parser.add_argument("--steps", type=int, default=8, help="that are timed, of 16 samples each")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=1, help="that a process computes with")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.steps, options.warm_up, options.sizes = 1, 2, 1, ["tiny"]
    if min(options.rounds, options.steps, options.warm_up, options.threads) < 1:
        parser.error("--rounds, --steps, --warm_up and --threads are from 1 on")
    return options


def run(job: Job, start: Callable[[Job], Start], threads: int) -> Watched:
    """One training from an empty directory."""
    shutil.rmtree(job.out, ignore_errors=True)
    job.out.mkdir(parents=True)
    started = start(job)
    variables = environment(threads, job.out / "cache")
    return watch(started.command, variables, started.log, job.out / "said.txt", job.steps)


def measure_gradients(
    systems: Sequence[System], setting: Setting, stage: int, threads: int
) -> list[dict]:
    """Each system's gradient against ours: the batch as one micro-batch, and cut as the system
    cuts it while its speed is measured."""
    ours = SYSTEMS[REFERENCE]
    reference = gradient(ours, setting, stage, ours.micro_batch, threads)
    rows = []
    for system in systems:
        for micro_batch in sorted({GLOBAL_BATCH, system.micro_batch}, reverse=True):
            if system is not ours:
                theirs = gradient(system, setting, stage, micro_batch, threads)
                row = {"stage": stage, "system": system.name, "micro_batch": micro_batch}
                rows.append(row | asdict(compare(theirs, reference)))
    return rows


def gradient(
    system: System, setting: Setting, stage: int, micro_batch: int, threads: int
) -> Gradients:
    """Of one step over the setting's `exact` samples."""
    job = system.one_step(setting, stage, micro_batch, setting.model.parent / "gradient")
    run(job, system.start, threads)
    return gradients_of_ours(job) if system.name == REFERENCE else gradients_of_peer(job)


def measure_speeds(
    systems: Sequence[System], setting: Setting, stages: Sequence[int], rounds: int, threads: int
) -> list[dict]:
    """A row for each stage and system; the systems take turns, each round from another one on."""
    found = {(stage, system.name): [] for stage in stages for system in systems}
    out = setting.model.parent / "speed"
    for number in range(rounds):
        first = number % len(systems)
        for stage in stages:
            for system in (*systems[first:], *systems[:first]):
                watched = run(system.timed(setting, stage, out), system.start, threads)
                figures = figures_of(watched, setting)
                found[stage, system.name].append(figures)
                print(
                    f"round {number + 1} of {rounds}, stage {stage}, {system.name}:"
                    f" {figures.samples_per_second:.2f} samples/s",
                    file=sys.stderr,
                )
    return table(found)


def profile_ours(setting: Setting, stage: int, threads: int) -> dict[str, float]:
    """Where our steps' time goes; a training of its own, since a trace costs time."""
    job = SYSTEMS[REFERENCE].timed(setting, stage, setting.model.parent / "profile")
    run(job, lambda job: start_ours(job, profile=True), threads)
    return shares(job.out / "run" / "profile" / "trace.json.gz")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    systems = [SYSTEMS[name] for name in options.systems]
    gradients, speeds, works, profiles = [], [], [], []
    try:
        for size in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                setting = write_setting(Path(folder), size, options.warm_up, options.steps)
                compared = []
                for stage in options.stages:
                    compared += measure_gradients(systems, setting, stage, options.threads)
                print_gradients(size, compared)
                timed = measure_speeds(
                    systems, setting, options.stages, options.rounds, options.threads
                )
                print_speeds(size, timed)
                for stage in options.stages:
                    works.append(work_row(size, stage, work(setting, stage), setting.samples))
                    found = profile_ours(setting, stage, options.threads)
                    profiles.append({"size": size, "stage": stage, "shares": found})
            gradients += [{"size": size} | row for row in compared]
            speeds += [{"size": size} | row for row in timed]
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    peak = peak_flops(time.process_time)
    missed = misses(speeds, works, profiles, peak)
    for row in missed:
        print(f"missed, stage {row['stage']}, {row['system']}: {row['why']}")
    write_result(
        "peers",
        options,
        what="samples a second of training, ours / theirs, the same samples in every step: "
        f"{options.steps} steps of {GLOBAL_BATCH} after {options.warm_up} of warm-up, float32 on a "
        f"CPU, {options.threads} threads, lengths 1/{SCALE} of bench/lengths/instruction.npz",
        target={name: f">= {times:g}x, both stages, tiny" for name, times in TARGETS.items()},
        figures={
            "systems": described(options.systems),
            "miss": missed,
            "speeds": speeds,
            "gradients": gradients,
            "work (derived)": works,
            "profile of ours": profiles,
            "gflops_of_one_large_product": round(peak / 1e9, 1),
        },
        spread=f"least and most of {options.rounds} interleaved rounds",
        refuted_by="python -m bench.peers on an idle machine: a smaller ratio, or a gradient of "
        "one micro-batch that differs by more than 1e-4",
        packages=("transformers",),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""ms-swift, transformers and this project on the same tiny model and data, both stages, on a CPU.

    python -m bench.peers                        # two tables, and bench/results/peers.json
    python -m bench.peers --rounds 1 --steps 2 --systems transformers ours    # a quick look

First every system takes one step over the same samples, and its gradient is compared with ours.
Then each trains the same samples in the same steps, in a process of its own with as many threads
as the others; in every round they take turns. A rate is of the steps after the warm-up. Start-up is
the time from the start of the process to the end of its first step, less a mean step. Memory is
the resident memory of the largest process. `make peers` installs ms-swift beside our environment.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.peers.gradients import Gradients, compare, gradients_of_ours, gradients_of_peer
from bench.peers.results import (
    figures_of,
    print_gradients,
    print_speeds,
    table,
    write_result,
)
from bench.peers.setting import GLOBAL_BATCH, SIZES, Setting, write_setting
from bench.peers.systems import REFERENCE, SYSTEMS, Job, System, environment
from bench.peers.watch import PeerError, Watched, watch
from bench.peers.work import surplus

HERE = Path(__file__).parent


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="in each all systems run once")
    parser.add_argument("--steps", type=int, default=8, help="that are timed, of 16 samples each")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=1, help="that a process computes with")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results" / "peers.json", help="the result"
    )
    options = parser.parse_args(arguments)
    if min(options.rounds, options.steps, options.warm_up, options.threads) < 1:
        parser.error("--rounds, --steps, --warm_up and --threads are from 1 on")
    return options


def run(job: Job, system: System, threads: int) -> Watched:
    """One training from an empty directory."""
    shutil.rmtree(job.out, ignore_errors=True)
    job.out.mkdir(parents=True)
    started = system.start(job)
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
    run(job, system, threads)
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
                watched = run(system.timed(setting, stage, out), system, threads)
                figures = figures_of(watched, setting)
                found[stage, system.name].append(figures)
                print(
                    f"round {number + 1} of {rounds}, stage {stage}, {system.name}:"
                    f" {figures.samples_per_second:.2f} samples/s",
                    file=sys.stderr,
                )
    return table(found)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    systems = [SYSTEMS[name] for name in options.systems]
    gradients, speeds, work = [], [], []
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
                    work.append({"size": size, "stage": stage, "ratio": surplus(setting, stage)})
            gradients += [{"size": size} | row for row in compared]
            speeds += [{"size": size} | row for row in timed]
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_result(options, gradients, speeds, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())

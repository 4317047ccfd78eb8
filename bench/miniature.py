"""The miniature's two stages under both plans: the same samples in fewer, fuller micro-batches.

    make demo; python -m bench.miniature

Donors, data and graft are the demo's (`--demo runs/digits`). Each stage runs for some steps on two
ranks under `samples` and under `packed`, one after the other and in turn; the seconds are those of
the log's lines after the first. Start-up is no part of them. The result is `miniature_plans.json`;
`miniature.json` is the demo's own.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.common import (
    ROOT,
    ROUNDS,
    arguments,
    interleaved,
    print_table,
    ratios,
    summary,
    write_result,
)
from examples.digits.processes import RANKS, run
from train.metrics import read_log

PLANS = ("samples", "packed")


def seconds_per_step(demo: Path, stage: str, plan: str, steps: int) -> float:
    """Of a stage under a plan, on all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run(
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)),
            *("train/sft.py", "--config", f"configs/demo/{stage}.yaml", "--plan", plan),
            *("--model", demo / "graft", "--dataset", demo / "data" / f"{stage}.jsonl"),
            *("--max_steps", str(steps), "--output_dir", folder),
            threads=1,
        )
        lines = [line for line in read_log(Path(folder) / "log.jsonl") if line["event"] == "train"]
    taken = lines[-1]["step"] - lines[0]["step"]
    return sum(line["seconds"] for line in lines[1:]) / taken


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments("miniature", __doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "digits")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(given)
    if not (options.demo / "graft").is_dir():
        parser.error(f"{options.demo} holds no graft; run `make demo` first, or give --demo")
    stages = ("stage1", "stage2")
    if options.quick:
        options.rounds, options.steps, stages = 1, 11, ("stage1",)
    rows = []
    for stage in stages:
        measures = {
            plan: lambda stage=stage, plan=plan: seconds_per_step(
                options.demo, stage, plan, options.steps
            )
            for plan in PLANS
        }
        taken = interleaved(options.rounds, measures)
        row = {"stage": stage} | {f"{plan}, s a step": summary(taken[plan]) for plan in PLANS}
        rows.append(row | {"speed-up": ratios(taken["samples"], taken["packed"])})
    print_table(rows)
    write_result(
        "miniature_plans",
        options,
        what=f"seconds of a step of the miniature's stages on {RANKS} ranks, of {options.steps} "
        "steps, under both plans",
        target={},
        figures=rows,
        spread=f"least and most of {options.rounds} interleaved rounds",
        refuted_by="make demo; python -m bench.miniature: `packed` is no faster",
        packages=("deepspeed",),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

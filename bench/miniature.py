"""The miniature's two stages under both plans: the same samples in fewer, fuller micro-batches.

    make demo; python bench/miniature.py      # a table, and bench/results/miniature_plans.json

Donors, data and graft are the demo's (`--demo runs/digits`). Each stage runs for some steps on two
ranks under `samples` and under `packed`, one after the other and in turn; the seconds are those of
the log's lines after the first. Start-up is no part of them.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.processes import RANKS, ROOT, run
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "digits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "miniature_plans.json"
    )
    options = parser.parse_args()
    stages = {}
    for stage in ("stage1", "stage2"):
        seconds = {plan: [] for plan in PLANS}
        for _ in range(options.rounds):
            for plan in PLANS:
                seconds[plan].append(seconds_per_step(options.demo, stage, plan, options.steps))
        ratios = [a / b for a, b in zip(seconds["samples"], seconds["packed"], strict=True)]
        stages[stage] = {
            "speed-up, median": round(statistics.median(ratios), 3),
            "speed-up, lowest and highest": [round(min(ratios), 3), round(max(ratios), 3)],
            "seconds a step": {plan: round(statistics.median(seconds[plan]), 4) for plan in PLANS},
        }
        print(stage, json.dumps(stages[stage]))
    result = {
        "machine": f"{platform.machine()}, {RANKS} ranks on 2 cores",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "steps": options.steps,
        "stages": stages,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

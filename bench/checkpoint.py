"""Checkpoints: how long training waits for one, until it is on the disk, and at a resume.

    python -m bench.checkpoint                     # 1.1 GB of weights and state, five checkpoints

A hybrid of random weights in float32, all of which train, on one process with the plain engine and
one thread. After each save comes about as much work (matrix products) as the write takes, so that
a checkpoint is written beside work, as in training. The memory for copies is taken before, as in
the loop. All figures but those of the first save are medians. Writes
`bench/results/checkpoint.json`.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from train.config import TrainConfig
from train.engine import PlainEngine
from train.freeze import freeze
from train.state import Run
from train.world import World
from vlm.checkpoint import write_json
from vlm.hf_config import parse_config
from vlm.model import VisionLanguageModel, initialise

ROOT = Path(__file__).parents[1]
TEST_MODEL = ROOT / "tests" / "golden" / "model"


def make_model(width: int, layers: int) -> tuple[VisionLanguageModel, dict]:
    """A hybrid and its `config.json`."""
    raw = json.loads((TEST_MODEL / "config.json").read_text())
    raw |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    raw["vision_config"]["out_hidden_size"] = width
    with torch.device("meta"):
        model = VisionLanguageModel(parse_config(raw))
    model = model.to_empty(device="cpu")
    initialise(model, torch.Generator().manual_seed(0))
    return model, raw


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, width: int, layers: int, saves: int) -> dict[str, object]:
    model, raw = make_model(width, layers)
    write_json(folder / "config.json", raw)
    config = TrainConfig(
        model=folder, dataset=["none"], output_dir=folder / "run", dtype="float32", deepspeed=None
    )
    engine = PlainEngine(freeze(model, config), config)
    world = World.start()
    run, saved = Run(config, world), []
    progress = run.begin(0, "")
    square = torch.randn(1024, 1024)

    def work(products: int) -> None:
        for _ in range(products):
            square @ square

    def save(step: int) -> None:
        run.save(model, engine, progress.at(progress.position, step, step), folder)

    with run.training(model, lambda _event, **figures: saved.append(figures)):
        run.reserve(model, engine)
        run.wait()
        first = seconds(lambda: save(1)) + seconds(run.wait)
        products = max(1, round(10 * first / seconds(lambda: work(10))))
        alone = seconds(lambda: work(products))
        beside = []
        for step in range(2, saves + 1):
            save(step)
            beside.append(seconds(lambda: work(products)))
            run.wait()
    later = {key: [figures[key] for figures in saved[1:]] for key in saved[0]}
    waited, total = statistics.median(later["waited"]), statistics.median(later["seconds"])
    return {
        "gigabytes": saved[0]["gigabytes"],
        "seconds": total,
        "waited": waited,
        "waited_percent": round(100 * waited / total, 2),
        "first_waited": saved[0]["waited"],
        "first_waited_percent": round(100 * saved[0]["waited"] / saved[0]["seconds"], 2),
        "work_beside_slower_percent": round(100 * (statistics.median(beside) / alone - 1), 1),
        "checked_at_resume_seconds": round(seconds(run.latest), 2),
        "processor": platform.processor() or platform.machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "checkpoint.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.width, options.layers, options.saves)
    options.out.parent.mkdir(exist_ok=True)
    write_json(options.out, figures)
    print("\n".join(f"{name:32}{value:>12}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

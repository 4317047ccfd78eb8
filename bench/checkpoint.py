"""Checkpoints: how long training waits for one, until it is on the disk, and at a resume.

    python -m bench.checkpoint                     # 1.1 GB of weights and state, five checkpoints

A hybrid of random weights in float32, all of which train, on one process with the plain engine and
one thread. After each save comes about as much work (matrix products) as the write takes, so that
a checkpoint is written beside work, as in training. The memory for copies is taken before, as in
the loop. All figures but those of the first save are medians.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.common import GOLDEN_MODEL, arguments, print_table, seconds, summary, write_result
from train.config import TrainConfig
from train.engine import PlainEngine
from train.freeze import freeze
from train.state import Run
from train.world import World
from vlm.checkpoint import write_json
from vlm.hf_config import parse_config
from vlm.model import VisionLanguageModel, initialise


def make_model(width: int, layers: int) -> tuple[VisionLanguageModel, dict]:
    """A hybrid and its `config.json`."""
    raw = json.loads((GOLDEN_MODEL / "config.json").read_text())
    raw |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    raw["vision_config"]["out_hidden_size"] = width
    with torch.device("meta"):
        model = VisionLanguageModel(parse_config(raw))
    model = model.to_empty(device="cpu")
    initialise(model, torch.Generator().manual_seed(0))
    return model, raw


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

    with run.training(lambda _event, **figures: saved.append(figures)):
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
    waited, total = summary(later["waited"], 4), summary(later["seconds"])
    slower = summary((100 * (took / alone - 1) for took in beside), 1)
    return {
        "gigabytes": saved[0]["gigabytes"],
        "seconds": total,
        "waited": waited,
        "waited_percent": round(100 * waited["median"] / total["median"], 2),
        "first_waited": saved[0]["waited"],
        "first_waited_percent": round(100 * saved[0]["waited"] / saved[0]["seconds"], 2),
        "work_beside_slower_percent": slower,
        "checked_at_resume_seconds": round(seconds(run.latest), 2),
    }


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments("checkpoint", __doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--saves", type=int, default=6)
    options = parser.parse_args(given)
    if options.quick:
        options.width, options.layers, options.saves = 64, 1, 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.width, options.layers, options.saves)
    print_table([{"checkpoint": name, "": value} for name, value in figures.items()])
    write_result(
        "checkpoint",
        options,
        what="seconds that a checkpoint takes to write, and that training waits for it",
        target={},
        figures=figures,
        spread=f"least and most of {options.saves - 1} checkpoints after the first",
        refuted_by="python -m bench.checkpoint on an idle machine: training waits longer",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

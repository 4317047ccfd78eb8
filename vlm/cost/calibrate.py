"""Seconds per useful FLOP of each module, measured on this device: a better clock than an MFU.

    python -m vlm.cost.calibrate --model DIR --stage 2 --recompute full --out coefficients.json
    python -m vlm.cost --model DIR --stage 2 ... --coefficients coefficients.json

Two layers of the decoder and two blocks of the tower, at the model's own widths and with random
weights, run forward and backward: the loss alone, then text in short and in long samples, then
images. Each measure gives one coefficient. Last comes a mixed micro-batch that none of them is
from, whose time is predicted and measured.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from vlm.batch import Batch
from vlm.checkpoint import write_json
from vlm.config import VLMConfig
from vlm.cost.flops import flops_by_module
from vlm.cost.report import SIZES, STAGES
from vlm.cost.samples import Samples, micro_batch
from vlm.cost.trained import any_trains
from vlm.gradients import drop_gradients
from vlm.hf_config import ConfigError, read_config
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel, initialise
from vlm.recompute import Policy

MODULES = ("vision tower", "merger", "decoder linear", "causal attention", "head")
ROUNDS = 5
SHORT = 64
"""Tokens of a short sample: hardly any attention."""


def calibrate(
    config: VLMConfig,
    trains: Collection[str],
    recompute: Policy,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    side: int,
) -> dict:
    """Coefficients, and the mixed micro-batch's predicted and real seconds.

    Args: tokens: of a micro-batch; side: patches of an image's side.
    """
    vision = replace(config.vision, depth=2, fullatt_block_indexes=(1,))
    small = replace(config, vision=vision, text=replace(config.text, num_hidden_layers=2))
    model = VisionLanguageModel(small)
    initialise(model, torch.Generator().manual_seed(0))
    model.to(device, dtype).set_recompute(recompute, recompute)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any_trains(name, trains))
    drop_gradients(model)
    image, visual = [1, side, side], side * side // config.vision.merge_unit
    contents = {
        "short": Samples.of([(SHORT, 1, [])] * (tokens // SHORT)),
        "long": Samples.of([(tokens, tokens // SHORT, [])]),
        "images": Samples.of([(2 * visual, 1, [image])] * max(1, tokens // (2 * visual))),
        "mixed": Samples.of([(3 * visual, visual, [image])] * max(1, tokens // (4 * visual))),
    }
    flops = {name: _flops(small, samples, trains) for name, samples in contents.items()}
    rows = tokens // 2
    hidden = torch.randn(rows, config.text.hidden_size, device=device, dtype=dtype)
    hidden.requires_grad_()
    ids = torch.zeros(rows, dtype=torch.int64, device=device)
    works = {name: _step(model, micro_batch(small, s).to(device)) for name, s in contents.items()}
    works["loss"] = lambda: cross_entropy_sum(hidden, model.head_weight, ids).backward()
    seconds = _medians(works, device)
    of_loss = _flops(small, Samples.of([(rows, rows, [])]), trains)["head"]
    found = {"head": seconds["loss"] / of_loss}
    # text alone: two equations, for the products and for attention
    names = ["decoder linear", "causal attention"]
    text = [[flops[kind][name] for name in names] for kind in ("short", "long")]
    rest = [seconds[kind] - found["head"] * flops[kind]["head"] for kind in ("short", "long")]
    linear, attention = np.linalg.solve(np.array(text), np.array(rest))
    if attention <= 0:  # it is lost in the noise: the products' speed for both
        linear = attention = sum(rest) / np.sum(text)
    found |= {"decoder linear": float(linear), "causal attention": float(attention)}
    left = seconds["images"] - sum(found[name] * flops["images"][name] for name in found)
    tower = max(left, 0) / (flops["images"]["vision tower"] + flops["images"]["merger"])
    found |= {"vision tower": tower, "merger": tower}
    predicted = sum(found[name] * flops["mixed"][name] for name in found)
    return {
        "seconds_per_flop": found,
        "check": {"predicted": predicted, "measured": seconds["mixed"]},
    }


def _flops(config: VLMConfig, samples: Samples, trains: Collection[str]) -> dict[str, float]:
    return flops_by_module(config, samples.lengths, samples.grids, samples.targets, trains)


def _step(model: VisionLanguageModel, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        cross_entropy_sum(model(batch), model.head_weight, batch.targets).backward()

    return step


def _medians(works: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Seconds of each, in rounds in which they take turns, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vlm.cost.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="its directory; of it config.json is read")
    add("--stage", type=int, choices=STAGES, required=True, help="1: the merger trains; 2: all")
    add("--recompute", choices=get_args(Policy), default="full", help="of each block")
    add("--dtype", choices=SIZES, default="bfloat16", help="of weights and activations")
    add("--tokens", type=int, default=8192, help="of a micro-batch")
    add("--side", type=int, default=64, help="patches of an image's side, a multiple of 2")
    add("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args(arguments)
    if options.side < 2 or options.side % 2 or options.tokens < 2 * SHORT:
        parser.error(f"--side is an even number above 0, --tokens at least {2 * SHORT}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = read_config(options.model)
        rest = options.recompute, getattr(torch, options.dtype), device
        found = calibrate(config, STAGES[options.stage], *rest, options.tokens, options.side)
        board = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        asked = {k: v if isinstance(v, int | str) else str(v) for k, v in vars(options).items()}
        write_json(options.out, {"device": board, "asked": asked} | found)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found["seconds_per_flop"].items():
        print(f"{name:18}{1e-12 / value if value else 0:10.3f} TFLOP/s")
    check = found["check"]
    apart = check["predicted"] / check["measured"] - 1
    print(f"a mixed micro-batch: {check['measured']:.4f} s, predicted {apart:+.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

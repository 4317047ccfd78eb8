"""What training a model costs: parameters, FLOPs, memory, communication, time. Needs no weights.

    python -m vlm.cost --model DIR --stage 2 --tokens 2048 --targets 200 --images 896x1120
    python -m vlm.cost --model DIR --stage 1 --gpus 8 --lengths sizes.jsonl --device h100

Exit code 2 is a mistake in what was asked for, told in one sentence.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NoReturn, get_args

from vlm.checkpoint import write_json
from vlm.cost.calibrate import MODULES
from vlm.cost.hardware import PEAKS
from vlm.cost.report import SIZES, STAGES, Setup, make_report, print_report
from vlm.cost.samples import LARGEST, CostError, Samples, one_sample, read_samples
from vlm.data.limits import Limits, environment_limits
from vlm.hf_config import ConfigError, read_config
from vlm.hub import add_hub_argument, resolve_model
from vlm.recompute import Policy


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlm.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _refuse
    add = parser.add_argument
    add("--model", required=True, help="a vision-language model: directory or hub id")
    add_hub_argument(parser)
    add("--stage", type=int, choices=STAGES, required=True, help="1: the merger trains; 2: all")
    add("--gpus", type=_count, default=Setup.gpus, help="1: one plain process, no ZeRO")
    add("--recompute", choices=get_args(Policy), default=Setup.recompute, help="of each block")
    add("--vit_recompute", choices=get_args(Policy), help="of the ViT's (default: the same)")
    add("--dtype", choices=SIZES, default=Setup.dtype, help="of weights and activations")
    add("--per_device_train_batch_size", type=_count, default=Setup.per_device_train_batch_size)
    add("--global_batch_size", type=_count, help="samples per step (default: as the recipe's)")
    add("--device", choices=PEAKS, help="whose bfloat16 peak predicts the time of a step")
    add("--peak_tflops", type=_above_zero, help="of a device that is not in the list")
    add("--mfu", type=_above_zero, default=Setup.mfu, help="share of the peak that is reached")
    add("--coefficients", type=Path, help="of python -m vlm.cost.calibrate, instead of a peak")
    add("--json", type=Path, help="also write the figures to this file, in bytes and FLOPs")

    add = parser.add_argument_group("samples: a file of their sizes, or one sample").add_argument
    add("--lengths", type=Path, metavar="FILE", help="JSONL; docs/cost.md has its form")
    add("--tokens", type=_count, metavar="N", help="in all, visual ones included")
    add("--targets", type=_targets, metavar="N", help="tokens that are learnt")
    add("--images", metavar="HxW,...", help="pixels; resized as in training")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.lengths:
        if any(x is not None for x in (options.tokens, options.targets, options.images)):
            raise CostError("--lengths describes the samples; leave --tokens and the like out")
    elif options.tokens is None or options.targets is None:
        raise CostError("give --lengths FILE, or --tokens and --targets of a sample")
    if options.device and options.peak_tflops:
        raise CostError("give --device or --peak_tflops, not both")
    if options.coefficients and (options.device or options.peak_tflops):
        raise CostError("give --coefficients, or a peak, not both")
    if options.device and options.dtype != "bfloat16":
        raise CostError(f"the peak of {options.device} is bfloat16's; give --peak_tflops instead")
    if options.mfu > 1:
        raise CostError(f"--mfu {options.mfu:g} is more than the whole peak, which is 1")


def _refuse(message: str) -> NoReturn:
    raise CostError(message)


def _count(text: str) -> int:
    digits = text.lstrip("0")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not an integer above 0")
    if len(digits) > len(str(LARGEST)) or int(digits) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is more than {LARGEST:,}")
    return int(digits)


def _targets(text: str) -> int:
    return 0 if text and not text.strip("0") else _count(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    if not 1 / LARGEST <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not from {1 / LARGEST:g} to {LARGEST:,}")
    return value


def _samples(options: argparse.Namespace, vision) -> Samples:
    if options.lengths:
        return read_samples(options.lengths, vision)
    sizes = []
    for text in (options.images or "").split(",") if options.images else ():
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
        if not found:
            raise CostError(f"--images: {text!r} is not HEIGHTxWIDTH in pixels, such as 896x1120")
        if max(map(len, found.groups())) > len(str(LARGEST)):
            raise CostError(
                f"--images: {text.strip()!r:.40} is more than {LARGEST:,} pixels a side"
            )
        sizes.append((int(found[1]), int(found[2])))
    try:
        limits = Limits(**environment_limits())
    except ValueError as error:
        raise CostError(str(error)) from None
    return one_sample(options.tokens, options.targets, sizes, vision, limits)


def _coefficients(options: argparse.Namespace) -> dict[str, float] | None:
    """Seconds per FLOP of each module, from a file of `vlm.cost.calibrate`."""
    if (path := options.coefficients) is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = {name: float(record["seconds_per_flop"][name]) for name in MODULES}
        measured = {name: record["asked"][name] for name in ("stage", "recompute", "dtype")}
    except (OSError, ValueError, KeyError, TypeError):
        raise CostError(
            f"--coefficients: {path} is no file of python -m vlm.cost.calibrate"
        ) from None
    if measured != {name: getattr(options, name) for name in measured}:
        words = ", ".join(f"{name} {value}" for name, value in measured.items())
        raise CostError(f"--coefficients: {path} was measured for {words}; measure it again")
    return found


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse_arguments(arguments)
        config = read_config(resolve_model(options.model, options.hub))
        setup = Setup(
            stage=options.stage,
            gpus=options.gpus,
            recompute=options.recompute,
            vit_recompute=options.vit_recompute,
            dtype=options.dtype,
            per_device_train_batch_size=options.per_device_train_batch_size,
            global_batch_size=options.global_batch_size,
            peak_tflops=options.peak_tflops or PEAKS.get(options.device),
            mfu=options.mfu,
            seconds_per_flop=_coefficients(options),
        )
        report = make_report(config, _samples(options, config.vision), setup)
        if options.json:
            _write(options.json, report)
    except (CostError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(report)
    return 0


def _write(path: Path, report: dict) -> None:
    try:
        write_json(path, report)
    except OSError as error:
        raise CostError(f"{path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())

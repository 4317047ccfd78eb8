"""What a run is told: dataclass, YAML and command line, in that order of rising precedence.

Flags keep the recipe's names. An unknown or mistyped key is an error, never ignored.
"""

import re
import sys
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from vlm.data.limits import Limits, environment_limits
from vlm.data.pack import Budget, Mode
from vlm.hub import Hub


class UsageError(ValueError):
    """An option, a path or a checkpoint that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of train/sft.py; the defaults are the recipe's and its peer's."""

    model: str | Path
    """The model to start from: its directory, or OWNER/NAME[@REVISION] of a hub."""
    dataset: list[str | dict[str, Any]]
    """Files, directories or data sets of the hub, `PATH` or `PATH#LIMIT`; in YAML also mappings
    with the fields of `vlm.data.sources.SourceSpec`."""
    output_dir: Path
    """The run's directory; the same command resumes from what it finds there."""
    hub: Hub = "huggingface"
    """That has a model or a data set which is no path here."""
    media_root: Path | None = None
    """What paths of media are relative to, and may not leave (default: the data file's directory,
    and anywhere)."""
    allow_urls: bool = False
    """Download images that are given as http(s) URLs."""

    streaming: bool = False
    """Read the data from its beginning to its end, window by window, without an index: for shards
    (.tar, .parquet, .jsonl; also globs and URLs of fsspec) too many to be measured first. Needs
    max_steps."""
    stream_window: int = 16
    """Steps whose samples are read, held in memory and shuffled together."""

    freeze_vit: bool = False
    freeze_aligner: bool = False
    """The merger."""
    freeze_llm: bool = False
    """Decoder, embedding and head."""

    num_train_epochs: int = 3
    max_steps: int | None = None
    """Optimiser steps in all; overrides num_train_epochs."""
    per_device_train_batch_size: int = 2
    """Samples in a micro-batch, where the plan is `samples`."""
    gradient_accumulation_steps: int = 8
    """Micro-batches per step, where the plan is `samples` and global_batch_size is not given."""
    global_batch_size: int | None = None
    """Samples per optimiser step; fixed at the run's first start (default:
    per_device_train_batch_size x gradient_accumulation_steps x ranks)."""
    plan: Mode = "packed"
    """How a step's samples become micro-batches: as few as the budgets allow, of equal FLOPs on
    all ranks; or `samples`, a fixed number in each. Neither changes the gradient."""
    token_budget: int = 8192
    """Tokens of a packed micro-batch; at least max_length."""
    patch_budget: int = 20480
    """Patches of a packed micro-batch (a sample above it goes alone): four images of 1003520
    pixels."""
    skip_text_only: bool = True
    """While the language model is frozen: leave samples without image or video out, which train
    nothing; their targets still count, so that the gradient is the same."""

    learning_rate: float = 5e-6
    vit_lr: float | None = None
    aligner_lr: float | None = None
    weight_decay: float = 0.1
    """Of weight matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.05

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations; bfloat16 keeps float32 masters."""
    gradient_checkpointing: bool = True
    deepspeed: str | None = "zero2"
    """`zero2`, or a DeepSpeed JSON file whose keys go over it; null: one process, no DeepSpeed."""

    max_length: int = 8192
    """Tokens of a sample."""
    truncation: Literal["delete", "left", "right"] = "delete"
    """What is done to a longer one: dropped and recorded, or its text cut (never its media)."""
    think: Literal["keep", "strip_history"] = "keep"
    """Thoughts (`<think>...</think>`) in answers before a sample's last question: learnt as they
    stand, or removed, as Qwen3's template does."""
    min_pixels: int = Limits.min_pixels
    max_pixels: int = Limits.max_pixels
    video_max_pixels: int = Limits.video_max_pixels
    """Of each frame."""
    fps: float = Limits.fps
    """Frames sampled per second of video."""
    fps_max_frames: int = Limits.fps_max_frames
    """Most frames of a video."""
    max_bad_fraction: float = 0.01
    """Share of bad samples that stops the run."""
    on_bad: Literal["skip", "error"] = "skip"
    """A bad sample is recorded and left out, or ends the run."""
    dataloader_num_workers: int = 4
    """Per rank."""
    dataloader_timeout: int = 600
    """Seconds without data after which the workers are called stuck and the run ends."""
    dataset_num_proc: int = 8
    """Processes that index the data."""

    save_steps: int = 1000
    save_total_limit: int = 10
    logging_steps: int = 5
    seed: int = 42

    def __post_init__(self) -> None:
        positive = (
            "num_train_epochs",
            "max_steps",
            "global_batch_size",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "max_grad_norm",
            "max_length",
            "token_budget",
            "patch_budget",
            "dataloader_timeout",
            "dataset_num_proc",
            "stream_window",
            "save_steps",
            "save_total_limit",
            "logging_steps",
        )
        for name in ("vit_lr", "aligner_lr", "dataloader_num_workers"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be below 0")
        for name in positive:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.streaming and self.max_steps is None:
            raise UsageError("streaming needs max_steps, since the length of an epoch is unknown")
        if not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"warmup_ratio is {self.warmup_ratio}; it must be in 0..1")
        if self.plan == "packed" and self.max_length > self.token_budget:
            raise UsageError(
                f"max_length {self.max_length} is above token_budget {self.token_budget}; a "
                "micro-batch must hold any sample"
            )
        try:
            Limits.of(self)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if self.freeze_vit and self.freeze_aligner and self.freeze_llm:
            raise UsageError("freeze_vit, freeze_aligner and freeze_llm leave nothing to train")

    @property
    def budget(self) -> Budget:
        """Of a micro-batch."""
        samples = self.per_device_train_batch_size
        return Budget(self.plan, samples, self.token_budget, self.patch_budget)

    def to_yaml(self) -> str:
        """The resolved config, loadable with --config."""
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The resolved config of a command line; UsageError in one sentence."""
    parser = ArgumentParser(
        prog="train/sft.py", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_argument(
        "--dataset",
        type=str | dict[str, Any],
        nargs="+",
        required=True,
        help="files, directories or data sets of the hub; PATH#N: the first N rows",
    )
    parser.add_class_arguments(TrainConfig, skip={"dataset"})
    try:
        parser.set_defaults(environment_limits())
        _check_files(sys.argv[1:] if arguments is None else arguments)
        options = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise UsageError(_explain(error)) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    options.pop("config", None)
    return TrainConfig(**options)


def _check_files(arguments: list[str]) -> None:
    """UsageError that names a `--config` file which is not what the parser expects."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    paths = [after for flag, after in pairs if flag == "--config"]
    paths += [flag.partition("=")[2] for flag in arguments if flag.startswith("--config=")]
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "")
            raise UsageError(f"--config {path} is not YAML: {reason}") from None
        if not isinstance(content, dict):
            raise UsageError(f"--config {path} holds no options; write `name: value` lines")
        data = content.get("dataset", [])
        if not isinstance(data, list) or not all(isinstance(d, str | dict) for d in data):
            raise UsageError(
                f"--config {path}: dataset is to be a list, a line `- PATH` or `- path: PATH` for "
                "each source"
            )


def _explain(error: ArgumentError) -> str:
    """jsonargparse's message on one line, with the nearest option for an unknown one."""
    message = " ".join(str(error).split())
    names = list(TrainConfig.__dataclass_fields__)
    words = re.findall(r"[\w-]+", message)
    if any(word in names for word in words):  # it is known, and has a wrong value
        return message
    for word in words:
        near = get_close_matches(word.lstrip("-"), names, 1, 0.75)
        if near and word.lstrip("-") not in names:
            return f"{message} (did you mean {near[0]}?)"
    return message

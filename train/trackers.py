"""Trackers beside `log.jsonl`, if asked for and installed: TensorBoard, W&B, SwanLab.

Where they send to is their own settings' business (WANDB_MODE, WANDB_PROJECT, SWANLAB_MODE, ...).
A resumed run goes on in the same place.
"""

import importlib.util
import os
import uuid
from typing import Any, Protocol

import yaml

from train.config import TrainConfig, UsageError

PROJECT = "graftvl"


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures of a step."""

    def close(self) -> None:
        """Nothing follows."""


def check_trackers(config: TrainConfig) -> None:
    """Raise UsageError where one that is asked for is not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"report_to names {name}, which is not installed; pip install {name}, or leave it "
                "out: log.jsonl holds all figures"
            )


def open_trackers(config: TrainConfig, resumed_step: int) -> list[Tracker]:
    """Those of `report_to`; for the first rank alone."""
    return [TRACKERS[name](config, resumed_step) for name in dict.fromkeys(config.report_to)]


class TensorBoard:
    """`tensorboard/` of the run."""

    def __init__(self, config: TrainConfig, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = config.output_dir / "tensorboard"
        # steps that a resumed run takes again are hidden
        self._writer = SummaryWriter(folder, purge_step=resumed_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its files lie in `wandb/` of ours."""

    def __init__(self, config: TrainConfig, _resumed_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(config),
            id=_own_id(config, "wandb"),
            resume="allow",
            dir=config.output_dir,
            config=_settings(config),
        )
        # its own counter refuses steps that a resumed run takes again
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """An experiment of SwanLab; its files lie in `swanlog/` of ours."""

    def __init__(self, config: TrainConfig, _resumed_step: int) -> None:
        import swanlab

        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            name=_name(config),
            id=_own_id(config, "swanlab"),
            resume="allow",
            log_dir=config.output_dir / "swanlog",
            config=_settings(config),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "swanlab": SwanLab}


def _name(config: TrainConfig) -> str:
    return config.run_name or config.output_dir.resolve().name


def _own_id(config: TrainConfig, tracker: str) -> str:
    """The tracker's name of this run, kept beside its files, so that a resumed one goes on."""
    path = config.output_dir / f"{tracker}.id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _settings(config: TrainConfig) -> dict[str, Any]:
    return yaml.safe_load(config.to_yaml())

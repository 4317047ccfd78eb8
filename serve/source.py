"""A model on disk: where it lies in a run, what it was trained with, which limits it was given."""

import json
from dataclasses import fields
from pathlib import Path

import yaml

from serve.limits import read_limits
from vlm.data.limits import Limits
from vlm.hf_config import ConfigError, read_json
from vlm.hub import Hub, resolve_model

MAX_STAGES = 20
EXPORT_MARKS = (
    "modeling_graft_vl.py",
    "DO_NOT_LOAD_WITH_STOCK_TRANSFORMERS.txt",
    "LITERAL_VARIANT.txt",
)


def find_model(reference: str | Path, hub: Hub = "huggingface") -> Path:
    """The model's directory in a run, a checkpoint, or the directory itself; a hub id's snapshot.

    Raises:
        ConfigError: there is none.
    """
    path = resolve_model(reference, hub)
    if (path / "config.json").exists():
        return path
    if (path / "latest").exists():
        path = path / (path / "latest").read_text(encoding="utf-8").strip()
    if (path / "model" / "config.json").exists():
        return path / "model"
    raise ConfigError(
        f"{path} is no run, checkpoint or model: it has neither config.json nor model/ nor latest"
    )


def is_export(folder: Path) -> bool:
    """serve/export.py made it."""
    return any((folder / name).exists() for name in EXPORT_MARKS)


def limits_of(folder: Path) -> dict:
    """Limits that a model comes with: an export's own, or those of the run that it lies in.

    What it says nothing of is left out.
    """
    if is_export(folder):
        own = read_limits(folder)
        return {field.name: getattr(own, field.name) for field in fields(Limits)}
    stages = training_stages(folder)
    trained = stages[-1]["config"] if stages else {}
    return {f.name: trained[f.name] for f in fields(Limits) if f.name in trained}


def training_stages(model_dir: Path) -> list[dict]:
    """Config, progress and log of each run that led to a checkpoint, the first stage first.

    A checkpoint is `RUN/checkpoint-N/model`, and RUN/config.yaml names the model that the run
    began with. What has been removed since, or is no run of ours, ends the history.
    """
    stages: list[dict] = []
    folder = model_dir.resolve()
    while folder.name == "model" and len(stages) < MAX_STAGES:
        run, trainer = folder.parent.parent, folder.parent / "trainer.json"
        if not (trainer.exists() and (run / "config.yaml").exists()):
            break
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        progress = read_json(trainer)
        log = _read_log(run / "log.jsonl", progress["step"])
        stages.insert(0, {"config": config, "progress": progress, "log": log})
        folder = Path(config["model"]).resolve()
    return stages


def _read_log(path: Path, last_step: int) -> list[dict]:
    """The training lines up to a step; a line torn by a crash is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == "train" and entry["step"] <= last_step:
            entries.append(entry)
    return entries

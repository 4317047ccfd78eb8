"""Tiny data and runs for the tests of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import write_hybrid
from train.config import TrainConfig
from train.sft import train
from train.state import Run
from train.world import World

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "dtype": "float32",
    "per_device_train_batch_size": 2,
    "global_batch_size": 6,
    "max_length": 256,
    "token_budget": 256,  # which packs a step of six ragged samples into two or three
    "patch_budget": 400,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.2,
    "max_grad_norm": 0.5,  # norms are near 10: clipping is active
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "dataset_num_proc": 1,
    "logging_steps": 1,
    "save_steps": 1000,
}


def write_data(folder: Path, samples: int = 16) -> Path:
    """Ragged samples: none to three images of several sizes, short and long answers."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(samples):
        images = []
        for place in range(number % 4):
            height, width = 28 * rng.integers(1, 6, 2)
            name = f"{number}-{place}.png"
            levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / name)
            images.append(name)
        question = "<image>" * len(images) + "word " * int(rng.integers(1, 20))
        answer = "answer " * int(rng.integers(1, 12))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns, "images": images}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_setting(folder: Path) -> dict:
    """A model and data in `folder`, as options."""
    folder.mkdir(exist_ok=True)
    return {"model": write_hybrid(folder / "model"), "dataset": [str(write_data(folder))]}


def run_plain(setting: dict, out: Path, **options) -> Path:
    """One process, in this one."""
    train(TrainConfig(**setting, output_dir=out, **OPTIONS | options), World.start())
    return out


def command(
    setting: dict, out: Path, ranks: int, script: Path = ROOT / "train" / "sft.py", **options
) -> list[str]:
    """The command line of the same run; `ranks` 0 is plain Python."""
    arguments = [str(script), "--config", str(write_config(setting, out, **options))]
    return [sys.executable, *arguments] if not ranks else [*launcher(ranks), *arguments]


def write_config(setting: dict, out: Path, **options) -> Path:
    """The options of a run as YAML, in a new file beside `out`."""
    values = setting | {"output_dir": out} | OPTIONS | options
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    number = len(list(out.parent.glob(f"{out.name}-*.yaml")))
    config = out.with_name(f"{out.name}-{number}.yaml")
    config.write_text(yaml.safe_dump(plain))
    return config


def launcher(ranks: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc_per_node", str(ranks)]


def environment() -> dict[str, str]:
    """One thread a rank; the project importable without being installed."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """Run a command line to its end, which is well under five minutes unless it hangs."""
    return subprocess.run(
        command,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_ranks(setting: dict, out: Path, ranks: int, **options) -> Path:
    """Several ranks, through torchrun and DeepSpeed."""
    done = launch(command(setting, out, ranks, **options))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def run_until(setting: dict, out: Path, step: int, **options) -> Path:
    """One process that stops as if its power had failed, once checkpoint-<step> is written."""

    class PowerFailure(Exception):
        pass

    honest = Run.save

    def save_and_stop(run: Run, model, engine, progress, *rest) -> None:
        honest(run, model, engine, progress, *rest)
        if progress.step == step:
            raise PowerFailure

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerFailure):
        patch.setattr(Run, "save", save_and_stop)
        run_plain(setting, out, **options)
    return out


def damage(picture: Path) -> None:
    """Cut an image's pixels off: its header is whole, so only decoding finds out."""
    picture.write_bytes(picture.read_bytes()[:100])


def log_of(run: Path, *events: str) -> list[dict]:
    """The lines of its log that are of these events, else of what became of its steps."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [x for x in lines if x["event"] in (events or ("train", "skipped", "refused"))]


def weights_of(run: Path, step: int) -> dict:
    return load_file(run / f"checkpoint-{step}" / "model" / "model.safetensors")


def trainer_of(run: Path, step: int) -> dict:
    return json.loads((run / f"checkpoint-{step}" / "trainer.json").read_text())


def same(ours: dict, theirs: dict) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)

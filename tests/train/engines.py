"""Runs on two ranks with every engine, made by one launch: each launch costs seconds."""

import json
from pathlib import Path

from tests.train.runs import ROOT, launch, launcher, write_config

CONSTANT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
"""With this schedule a run of three steps is the first half of one of six."""
ZERO = ("zero1", "zero2", "zero2_offload")
STAGE_1 = {"freeze_vit": True, "freeze_llm": True, "skip_text_only": False, "plan": "samples"}
STAGE_1 |= {"per_device_train_batch_size": 1, "max_bad_fraction": 0.1}
"""One sample a micro-batch, those of text alone too."""
RELAY = ("zero1", "zero2_offload", "file", None, "zero2")
"""A step by each engine, then the last one on four ranks; None is one plain process."""


def two_rank_configs(setting: dict, folder: Path) -> list[Path]:
    """What `two_ranks` runs, each below its own name."""
    file = folder / "deepspeed.json"
    sections = {"optimizer": {"type": "AdamW", "params": {"lr": 1}}, "fp16": {"enabled": "auto"}}
    sections["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 1}}
    zero = {"stage": 1, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
    file.write_text(json.dumps(sections | {"zero_optimization": zero, "train_batch_size": "auto"}))

    def run(name: str, engine: str | None, own: dict = setting, **options) -> Path:
        engine = str(file) if engine == "file" else engine
        return write_config(own, folder / name, deepspeed=engine, **CONSTANT | options)

    # with the masters of before the last step and of after it
    configs = [run(name, name, save_steps=5) for name in ("zero1", "zero2_offload", "file")]
    configs += broken_and_whole(setting, folder, "zero2", "bfloat16")
    configs += broken_and_whole(setting, folder, "zero2_offload", "float32")
    configs += [run("relay", engine, max_steps=n) for n, engine in enumerate(RELAY, start=1)]
    damaged = {"model": folder / "damaged" / "model"}
    damaged["dataset"] = [str(folder / "damaged" / "data.jsonl")]
    configs.append(run("stage 1", "zero2", damaged, **STAGE_1))
    options = {"max_steps": 3, "save_steps": 1}
    return configs + [run(f"refused {name}", name, **options) for name in ZERO]


def broken_and_whole(setting: dict, folder: Path, engine: str, dtype: str) -> list[Path]:
    """Three steps and three more below one name, six in one go below another."""
    options = {"deepspeed": engine, "dtype": dtype} | CONSTANT
    broken, whole = (folder / f"{engine} {dtype}{end}" for end in (" broken", ""))
    configs = [write_config(setting, broken, **options, max_steps=steps) for steps in (3, 6)]
    return [*configs, write_config(setting, whole, **options)]


def run_several(configs: list[Path], ranks: int) -> None:
    """The runs one after another, on the same ranks."""
    script = ROOT / "tests" / "train" / "several.py"
    done = launch([*launcher(ranks), str(script), *map(str, configs)])
    assert done.returncode == 0, done.stderr[-3000:]

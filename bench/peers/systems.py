"""The systems that are compared: how each is told to train the same, and where its log is.

All have the recipe's values. What the recipe has for many GPUs is the same for all: float32 on a
CPU, no DeepSpeed, one worker that loads while the other process computes.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from bench.peers.plain import PlainOptions
from bench.peers.setting import GLOBAL_BATCH, MAX_PIXELS, MIN_PIXELS, SEED, Setting
from bench.peers.watch import PeerError

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-swift" / "bin" / "python"
"""Of ms-swift; the transformers loops run in our own environment."""
WORKERS = 1
UNCLIPPED = 1e9
"""A largest norm that no gradient has."""


@dataclass(frozen=True)
class Job:
    """One training, whoever does it."""

    setting: Setting
    stage: int
    """1: the merger alone; 2: everything."""
    data: Path
    steps: int
    micro_batch: int
    accumulation: int
    max_grad_norm: float
    out: Path


@dataclass(frozen=True)
class Start:
    command: list[str]
    log: Path


@dataclass(frozen=True)
class System:
    name: str
    what: str
    micro_batch: int
    """Samples; ours packs instead."""
    data: Callable[[Setting], Path]
    start: Callable[[Job], Start]

    def timed(self, setting: Setting, stage: int, out: Path) -> Job:
        """The training whose speed is measured."""
        steps, accumulation = setting.warm_up + setting.steps, GLOBAL_BATCH // self.micro_batch
        return Job(
            setting, stage, self.data(setting), steps, self.micro_batch, accumulation, 1.0, out
        )

    def one_step(self, setting: Setting, stage: int, micro_batch: int, out: Path) -> Job:
        """A step over samples of whose pixels all systems think alike, for its gradient."""
        accumulation = GLOBAL_BATCH // micro_batch
        return Job(setting, stage, setting.exact, 1, micro_batch, accumulation, UNCLIPPED, out)


def environment(threads: int, cache: Path) -> dict[str, str]:
    """Variables that every process has: threads, nothing from a network, empty caches."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MAX_PIXELS": str(MAX_PIXELS),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "USE_HF": "1",  # ms-swift asks ModelScope otherwise, and waits for it
        "GRAFTVL_CACHE": str(cache),
        "HF_HOME": str(cache),
        "MODELSCOPE_CACHE": str(cache),
    }


def start_ours(job: Job, profile: bool = False) -> Start:
    """train/sft.py with configs/stage1.yaml or stage2.yaml, packed, nothing computed twice."""
    recipe = yaml.safe_load((ROOT / "configs" / f"stage{job.stage}.yaml").read_text())
    options = recipe | {
        "model": str(job.setting.model),
        "dataset": [str(job.data)],
        "output_dir": str(job.out / "run"),
        "dtype": "float32",
        "deepspeed": None,
        "gradient_checkpointing": False,
        "max_steps": job.steps,
        "max_grad_norm": job.max_grad_norm,
        "max_pixels": MAX_PIXELS,
        "logging_steps": 1,
        "dataloader_num_workers": WORKERS,
        "dataset_num_proc": WORKERS,
        "seed": SEED,
        "profile": profile,
    }
    config = job.out / "ours.yaml"
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    script = str(ROOT / "train" / "sft.py")
    return Start([sys.executable, script, "--config", str(config)], job.out / "run" / "log.jsonl")


def start_plain(job: Job, gradient_checkpointing: bool) -> Start:
    """bench/peers/plain.py."""
    options = PlainOptions(
        model=str(job.setting.model),
        data=str(job.data),
        output_dir=str(job.out),
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        merger_alone=job.stage == 1,
        max_steps=job.steps,
        micro_batch=job.micro_batch,
        accumulation=job.accumulation,
        gradient_checkpointing=gradient_checkpointing,
        workers=WORKERS,
        max_grad_norm=job.max_grad_norm,
        seed=SEED,
    )
    path = job.out / "plain.json"
    path.write_text(json.dumps(asdict(options)), encoding="utf-8")
    command = [sys.executable, "-m", "bench.peers.plain", str(path)]
    return Start(command, job.out / "log.jsonl")


def start_swift(job: Job) -> Start:
    """`swift sft` with the flags of the recipe, as ms-swift 4.6 spells them."""
    if not PEERS_PYTHON.exists():
        raise PeerError("ms-swift is not installed; run `make peers`, or name other --systems")
    frozen = str(job.stage == 1).lower()
    flags = {
        "model": job.setting.model,
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "external_plugins": Path(__file__).parent / "swift_plugin.py",
        "dataset": job.data,
        "split_dataset_ratio": 0,
        "tuner_type": "full",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "use_cpu": "true",
        "check_model": "false",  # else it asks a hub for a newer one
        "max_steps": job.steps,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "learning_rate": 5e-6,
        "warmup_ratio": 0.05,
        "max_grad_norm": job.max_grad_norm,
        "eval_steps": -1,
        "save_steps": 1000,
        "save_total_limit": 10,
        "logging_steps": 1,
        "max_length": 8192,
        "dataloader_num_workers": WORKERS,
        "dataset_num_proc": WORKERS,
        "freeze_vit": frozen,
        "freeze_llm": frozen,
        "freeze_aligner": "false",
        "dataset_shuffle": "false",  # the file has the order of all systems
        "train_dataloader_shuffle": "false",
        "seed": SEED,
        "output_dir": job.out / "run",
        "add_version": "false",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [str(PEERS_PYTHON.parent / "swift"), "sft", *words]
    return Start(command, job.out / "run" / "logging.jsonl")


SYSTEMS = {
    system.name: system
    for system in (
        System(
            "ms-swift",
            "ms-swift with the recipe's flags",
            micro_batch=2,
            data=lambda setting: setting.sequence,
            start=start_swift,
        ),
        System(
            "transformers",
            "transformers' Trainer with the recipe's flags",
            micro_batch=2,
            data=lambda setting: setting.sequence,
            start=lambda job: start_plain(job, gradient_checkpointing=True),
        ),
        System(
            "transformers-best",
            "the same without checkpointing, samples grouped by length, 4 in a micro-batch (the "
            "fastest of 4, 8 and 16)",
            micro_batch=4,
            data=lambda setting: setting.grouped,
            start=lambda job: start_plain(job, gradient_checkpointing=False),
        ),
        System(
            "ours",
            "train/sft.py, packed, without checkpointing",
            micro_batch=2,
            data=lambda setting: setting.ours,
            start=start_ours,
        ),
    )
}
REFERENCE = "ours"

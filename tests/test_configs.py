"""Every YAML in configs/ is accepted by the script that it is for."""

import json
from pathlib import Path

import pytest
import yaml

from serve.serve_config import parse as parse_serving
from train.command_line import parse
from train.config import UsageError

ROOT = Path(__file__).parent.parent
SERVING = ROOT / "configs" / "serve.yaml"
EVALUATION = set((ROOT / "configs" / "eval").glob("*.yaml"))  # tests/eval/test_benchmarks.py
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - {SERVING} - EVALUATION)
MODEL_DATA_AND_OUTPUT = ["--model", "model", "--dataset", "data.jsonl", "--output_dir", "run"]
# The recipe of both stages, as published; what it leaves out is its trainer's default.
RECIPE = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5e-6,
    "warmup_ratio": 0.05,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
    "deepspeed": "zero2",
    "max_length": 8192,
    "max_pixels": 1003520,
    "dataloader_num_workers": 4,
    "dataset_num_proc": 8,
    "save_steps": 1000,
    "save_total_limit": 10,
    "logging_steps": 5,
    "seed": 42,
}
SERVING_RECIPE = {
    "max_pixels": 1003520,
    "video_max_pixels": 50176,
    "fps_max_frames": 12,
    "max_images": 5,
    "max_videos": 2,
    "max_model_len": 8192,
    "max_new_tokens": 2048,
    "gpu_memory_utilization": 0.9,
    "served_model_name": "Qwen3-VL",
    "port": 8000,
}


def load(path: Path, *arguments: str):
    return parse(["--config", str(path), *MODEL_DATA_AND_OUTPUT, *arguments])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_loads_and_each_of_its_values_arrives(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    loaded = yaml.safe_load(load(path).to_yaml())
    for key in ("model", "dataset", "output_dir"):  # given on the command line, which wins
        written.pop(key, None)
    assert written
    assert {key: loaded[key] for key in written} == written


def test_the_serving_config_loads_and_holds_the_recipes_limits(monkeypatch):
    for variable in ("MAX_PIXELS", "VIDEO_MAX_PIXELS", "FPS_MAX_FRAMES"):
        monkeypatch.setenv(variable, "20000")  # to which the file does not yield
    loaded = parse_serving(["model", "--config", str(SERVING)])
    written = yaml.safe_load(SERVING.read_text(encoding="utf-8"))
    assert {key: getattr(loaded, key) for key in written} == written
    assert written.items() >= SERVING_RECIPE.items()


@pytest.mark.parametrize(("stage", "frozen"), [(1, True), (2, False)])
def test_the_stages_hold_the_recipes_values(stage, frozen):
    loaded = yaml.safe_load(load(ROOT / f"configs/stage{stage}.yaml").to_yaml())
    assert {key: loaded[key] for key in RECIPE} == RECIPE
    assert (loaded["freeze_vit"], loaded["freeze_llm"]) == (frozen, frozen)
    assert loaded["freeze_aligner"] is False


def test_the_tuned_stage_differs_from_the_recipes_only_in_how_fast_the_merger_learns():
    recipe, tuned = (
        yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))
        for name in ("stage1.yaml", "stage1_tuned.yaml")
    )
    different = {key for key in recipe | tuned if recipe.get(key) != tuned.get(key)}
    assert different == {"learning_rate", "weight_decay"}


def test_the_command_line_wins_over_the_file():
    path = ROOT / "configs/stage1.yaml"
    assert load(path, "--learning_rate", "0.5").learning_rate == 0.5


@pytest.mark.parametrize("key", ["learning_rat", "freeze_vti"])
def test_a_mistyped_key_is_an_error_that_names_it(tmp_path, key):
    file = tmp_path / "bad.yaml"
    file.write_text(json.dumps({key: 1}), encoding="utf-8")
    with pytest.raises(UsageError, match=key):
        load(file)

"""Mistakes in what was asked for: one clear sentence, exit code 2, before any training."""

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest

import train.sft
from tests.tiny import write_hybrid
from tests.train.runs import OPTIONS, command, environment
from train.command_line import parse
from train.config import TrainConfig, UsageError
from train.world import LAUNCH, World
from vlm.data.limits import Limits, environment_limits

GIVEN = ["--model", "m", "--dataset", "d", "--output_dir", "o"]


def run_main(monkeypatch, capsys, setting, out, *flags, **options) -> tuple[int, list[str]]:
    """Exit code and error lines of the script, run in this process."""
    argv = command(setting, out, 0, **options)[1:]
    monkeypatch.setattr(sys, "argv", [*argv, *flags])
    code = train.sft.main()
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--learnin_rate", "1"], "did you mean learning_rate?"),
        (["--lr", "1"], "did you mean learning_rate?"),
        (["--batch_size", "2"], "did you mean per_device_train_batch_size?"),
        (["--resume"], "the same command resumes"),
        (["--resume_from_checkpoint", "last"], "the same command resumes"),
        (["--learning_rate", "fast"], "learning_rate is fast; it must be a number"),
        (["--freeze_vit", "maybe"], "freeze_vit is maybe; it must be true or false"),
        (["--num_train_epochs", "1.5"], "num_train_epochs is 1.5; it must be a whole number"),
        (["--max_steps", "x"], "max_steps is x; it must be a whole number, or null"),
        (["--plan", "x"], "plan is x; it must be one of packed, samples"),
        (["--report_to", "x"], "report_to is x; it must be one of tensorboard, wandb, swanlab"),
        (
            ["--gradient_checkpointing", "point"],
            "point; it must be true or false, or one of none, pointwise, full",
        ),
        (["--split_dataset_ratio", "2"], "2.0; it must be at least 0 and below 1"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type"),
        (["--warmup_ratio", "1.5"], "it must be at least 0 and below 1"),
        (["--save_steps", "0"], "save_steps is 0; it must be above 0"),
        (["--deepspeed", "none"], "none is no setting; for no DeepSpeed write null"),
        (["--eval_steps", "5"], "eval_steps needs val_dataset, split_dataset_ratio or text_probe"),
        (["--eval_steps", "-2"], "eval_steps is -2"),
        (["--val_dataset", "v.jsonl", "--split_dataset_ratio", "0.1"], "not both"),
        (
            ["--min_pixels", "5000", "--max_pixels", "4000"],
            "max_pixels 4000 is below min_pixels 5000",
        ),
        (
            ["--freeze_vit", "true", "--freeze_aligner", "true", "--freeze_llm", "true"],
            "nothing to",
        ),
        (["--model", "nowhere"], "nowhere"),
        (["--max_length", "3"], "no sample to learn from"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(monkeypatch, capsys, setting, tmp_path, flags, says):
    run = tmp_path / "run"
    code, lines = run_main(monkeypatch, capsys, setting, run, *flags)
    assert code == 2
    (line,) = [line for line in lines if not line.startswith("index")]  # the progress bar
    assert line.startswith("error: ") and says in line
    assert not list(run.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere.jsonl", "does not exist"), ("data.csv", "only .jsonl, .json, .parquet")],
)
def test_data_that_cannot_be_read_is_named(monkeypatch, capsys, setting, tmp_path, name, says):
    if name == "data.csv":
        (tmp_path / name).write_text("a,b")
    missing = setting | {"dataset": [str(tmp_path / name)]}
    code, lines = run_main(monkeypatch, capsys, missing, tmp_path / "run")
    assert code == 2 and name in lines[-1] and says in lines[-1]


def test_a_file_with_an_unknown_key_is_refused(monkeypatch, capsys, setting, tmp_path):
    code, lines = run_main(monkeypatch, capsys, setting, tmp_path / "run", freeze_vitt=True)
    assert code == 2 and "freeze_vitt" in lines[-1] and "did you mean freeze_vit?" in lines[-1]


def test_too_many_bad_samples_stop_the_run(monkeypatch, capsys, setting, tmp_path):
    """One of 16, found without decoding: 6 %, where 1 % is allowed."""
    data = tmp_path / "data.jsonl"
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data.write_text("\n".join([json.dumps(good)] * 15 + [json.dumps({"messages": []})]))
    bad = setting | {"dataset": [str(data)]}
    code, lines = run_main(monkeypatch, capsys, bad, tmp_path / "run")
    assert code == 2 and "1 of 16 samples are bad" in lines[-1] and "data.jsonl:16" in lines[-1]
    code, _ = run_main(monkeypatch, capsys, bad, tmp_path / "run", max_bad_fraction=0.1)
    assert code == 0


def test_the_strict_stop_at_the_first_bad_sample(monkeypatch, capsys, setting, tmp_path):
    data = tmp_path / "data.jsonl"
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data.write_text("\n".join([json.dumps(good)] * 200 + [json.dumps({"messages": []})]))
    strict = setting | {"dataset": [str(data)]}
    code, lines = run_main(monkeypatch, capsys, strict, tmp_path / "run", on_bad="error")
    assert code == 2 and "data.jsonl:201: messages is empty; on_bad is error" in lines[-1]
    code, lines = run_main(monkeypatch, capsys, strict, tmp_path / "run", on_bad="stop")
    assert code == 2 and "on_bad" in lines[-1]


def test_the_process_itself_exits_with_2(setting, tmp_path):
    argv = [*command(setting, tmp_path / "run", 0), "--sed", "1"]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "did you mean seed?" in done.stderr


def test_max_pixels_of_the_environment_yields_to_the_command_line(monkeypatch, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("{model: m, dataset: [d.jsonl], output_dir: o}")
    required = ["--config", str(file)]
    assert parse(required).max_pixels == 1003520
    monkeypatch.setenv("MAX_PIXELS", "50176")
    assert environment_limits() == {"max_pixels": 50176}
    assert parse(required).max_pixels == 50176
    assert parse([*required, "--max_pixels", "100352"]).max_pixels == 100352
    monkeypatch.setenv("MAX_PIXELS", "many")
    with pytest.raises(UsageError, match="MAX_PIXELS='many' is not a number"):
        parse(required)


def test_the_saved_config_is_the_run(plain_run):
    saved = parse(["--config", str(plain_run / "config.yaml")])
    assert {name: getattr(saved, name) for name in OPTIONS} == OPTIONS
    assert saved.output_dir == plain_run


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dataset: a.jsonl\n", "run.yaml: dataset is to be a list"),
        ("dataset:\n  path: a.jsonl\n", "run.yaml: dataset is to be a list"),
        ("- 1\n", "run.yaml holds no options"),
        ("a: b: c\n", "run.yaml is not YAML"),
    ],
)
def test_a_config_file_that_cannot_be_meant_is_named(tmp_path, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    for flags in (["--config", str(file)], [f"--config={file}"]):
        with pytest.raises(UsageError) as error:
            parse([*flags, "--model", "m", "--output_dir", "o"])
        assert says in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read"):
        parse(["--config", "none.yaml"])


@pytest.mark.parametrize("name", ["freeze_parameters", "trainable_parameters", "report_to"])
@pytest.mark.parametrize("value", ["tensorboard", "", "{a: b}", "[1]"])
def test_a_list_that_is_none_is_shown_its_form(tmp_path, name, value):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: {value}\n", encoding="utf-8")
    with pytest.raises(UsageError) as error:
        parse(["--config", str(file), *GIVEN])
    assert str(error.value).endswith(
        f'run.yaml: {name} is to be a list, `{name}: ["A", "B"]`, or [] for none'
    )


def test_a_key_that_comes_twice_is_named_with_its_line(tmp_path):
    file = tmp_path / "run.yaml"
    for text, line, key in (
        ("seed: 1\nfps: 2\nseed: 3\n", 3, "seed"),
        ("dataset:\n- path: a\n  path: b\n", 3, "path"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError) as error:
            parse(["--config", str(file), *GIVEN])
        assert f"run.yaml, line {line}: {key} is given a second time" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("adam_beta1", 1.5, "at least 0 and below 1"),
        ("adam_beta2", 1, "at least 0 and below 1"),
        ("adam_epsilon", -1, "above 0"),
        ("seed", -1, "in 0..2^63-1"),
        ("max_bad_fraction", -1, "in 0..1"),
        ("max_bad_fraction", 1.01, "in 0..1"),
        ("vit_lr", -1, "0 or above"),
        ("learning_rate", ".nan", "above 0"),
        ("learning_rate", ".inf", "finite"),
        ("vit_weight_decay", ".nan", "0 or above"),
        ("max_hours", ".inf", "finite"),
        ("max_grad_norm", ".nan", "above 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(tmp_path, name, value, says):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: {value}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=f"^{name} is .*; it must be ") as error:
        parse(["--config", str(file), *GIVEN])
    assert str(error.value).endswith(says)


def test_no_clipping_is_an_infinite_norm(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_grad_norm: .inf\n", encoding="utf-8")
    assert parse(["--config", str(file), *GIVEN]).max_grad_norm == math.inf


def test_every_number_has_its_range():
    """Beside the option, or among the limits of media."""
    numbers = {
        option.name
        for option in fields(TrainConfig)
        if {int, float} & {option.type, *get_args(option.type)}
    }
    checked = {option.name for option in fields(TrainConfig) if "allowed" in option.metadata}
    assert numbers - checked == numbers & {limit.name for limit in fields(Limits)}
    assert checked <= numbers and len(checked) > 30


def test_a_rank_left_in_the_environment_launches_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert not World.start().launched


def test_a_wrong_value_suggests_no_other_name(tmp_path):
    with pytest.raises(UsageError) as error:
        parse(["--model", "m", "--dataset", "d", "--output_dir", "o", "--learning_rate", "abc"])
    assert "learning_rate" in str(error.value) and "did you mean" not in str(error.value)


def test_a_models_own_directory_is_no_run(monkeypatch, capsys, setting, tmp_path):
    folder = write_hybrid(tmp_path / "itself")
    code, lines = run_main(monkeypatch, capsys, setting, folder)
    assert code == 2 and "is a model's directory" in lines[-1]
    assert not (folder / "config.yaml").exists()


@pytest.mark.parametrize("after", [[], ["--seed", "3"]])
@pytest.mark.parametrize("name", ["dry_run", "freeze_vit", "vit_gradient_checkpointing"])
def test_a_flag_without_a_value_is_true(name, after):
    assert getattr(parse([*GIVEN, f"--{name}", *after]), name) is True
    assert getattr(parse([*GIVEN, f"--{name}", "false", *after]), name) is False
    assert getattr(parse([*GIVEN, f"--{name}=false", *after]), name) is False


def test_a_number_needs_its_value():
    with pytest.raises(UsageError, match="--learning_rate: expected one argument"):
        parse([*GIVEN, "--learning_rate", "--dry_run"])


def test_a_start_without_options_names_what_is_needed():
    with pytest.raises(UsageError, match="output_dir"):
        parse([])


def test_the_help_describes_every_option_whose_name_does_not(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Download images" in shown and "Held-out data" in shown
    bare = re.findall(r"--(\w+) (?:\S+ )?\((?:type|required)", shown)
    assert set(bare) <= {"adam_beta1", "adam_beta2", "adam_epsilon"}


@pytest.mark.parametrize(("rank", "waits"), [("0", 0), ("1", 1)])
def test_of_a_machines_ranks_the_first_tells_a_mistake(monkeypatch, capsys, rank, waits):
    for name in LAUNCH:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--sed", "1"])
    told = []
    monkeypatch.setattr("time.sleep", lambda _: told.append(capsys.readouterr().err))
    assert train.sft.main() == 2
    assert told == [""] * waits  # the launcher ends it here
    assert "did you mean seed?" in capsys.readouterr().err

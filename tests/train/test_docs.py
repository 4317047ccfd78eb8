"""docs/training.md is true: options, flags of the recipe, commands, figures and files."""

import re
import shlex
from dataclasses import fields

import pytest
import yaml

from tests.train.runs import ROOT, log_of
from train.command_line import parse
from train.config import TrainConfig
from vlm.data.limits import ENVIRONMENT

DOC = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
OPTIONS = {field.name for field in fields(TrainConfig)}


def section(title: str) -> str:
    return DOC.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Cells of the first table of a section, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def commands() -> list[list[str]]:
    """Commands of the bash blocks, in words, without variables before them."""
    blocks = re.findall(r"^```bash\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    return [[word for word in line if not re.match(r"[A-Z_]+=", word)] for line in words]


RECIPE = rows("The recipe's flags")


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_every_option_is_told(option):
    assert re.search(rf"`(--)?{option}\b", DOC), f"docs/training.md does not tell of {option}"


def test_every_flag_of_ours_exists_and_takes_the_value_that_is_shown():
    given = ["--model", "m", "--dataset", "d", "--output_dir", "o"]
    for _, ours, _ in RECIPE:
        assert ours
        for words in map(str.split, code(ours)):
            if words[0].startswith("--"):
                assert words[0].removeprefix("--") in OPTIONS, ours
                if len(words) > 1:
                    assert str(getattr(parse([*given, *words]), words[0][2:])) == words[1]
            else:
                assert (ROOT / words[0]).exists(), ours


def test_the_values_are_those_of_the_recipes_config():
    arguments = ["--config", str(ROOT / "configs/stage1.yaml"), "--model", "m"]
    config = parse([*arguments, "--dataset", "d", "--output_dir", "o"])
    compared = 0
    for theirs, ours, _ in RECIPE:
        for words in map(str.split, code(theirs)):
            if words[0] in code(ours) and len(words) == 2:
                assert getattr(config, words[0][2:]) == yaml.load(words[1], YAML), words
                compared += 1
    assert compared >= 25


class YAML(yaml.SafeLoader):
    """With numbers as a command line has them: YAML takes 5e-6 for a word."""


YAML.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[0-9.]+e[-+]?[0-9]+$"), list("0123456789")
)


def test_every_variable_is_read_where_it_is_said_to_be():
    launcher = (ROOT / "train" / "launch.sh").read_text(encoding="utf-8")
    for theirs, ours, _ in RECIPE:
        for name in (word.split("=")[0] for word in code(theirs) if word[0].isupper()):
            if "train/launch.sh" in ours:
                assert f"${{{name}:-" in launcher
            elif "--" in ours and "the same" in ours:
                assert f"--{ENVIRONMENT[name]}" in ours
    assert set(ENVIRONMENT) <= {word.split("=")[0] for row in RECIPE for word in code(row[0])}


def test_the_commands_have_options_that_exist():
    seen = set()
    for words in commands():
        script = next(w for w in words if w.endswith(("sft.py", "launch.sh", ".sbatch")))
        assert (ROOT / script).exists()
        options = words[words.index(script) + 1 :]
        config = options.index("--config") + 1
        options[config] = str(ROOT / options[config])
        assert parse(options)
        seen.add(script)
    assert len(seen) == 3


def test_later_files_and_the_command_line_win(tmp_path):
    for name, rate in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.yaml").write_text(f"learning_rate: {rate}\nseed: {int(rate)}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    given = ["--model", "m", "--dataset", "d", "--output_dir", "o"]
    config = parse([*files, *given, "--seed", "3"])
    assert (config.learning_rate, config.seed) == (2.0, 3)


def test_the_figures_are_those_of_a_run(plain_run):
    told = {name for names, _ in rows("Figures") for name in code(names)}
    logged = {name for line in log_of(plain_run) if line["event"] == "train" for name in line}
    obvious = {"event", "step", "epoch", "tokens", "targets", "samples", "seconds"}
    assert told == logged - obvious


def test_the_files_are_those_of_a_run(plain_run):
    (tree,) = re.findall(r"```\noutput_dir/\n(.*?)```", DOC, re.DOTALL)
    names = [name for line in tree.splitlines() for name in line.strip().split("  ")[0].split()]
    absent = {"answers.jsonl", "ledger.jsonl", "budget.json"}  # not of every run
    for name in set(names) - absent:
        pattern = name.rstrip("/").replace("<step>", "*")
        assert list(plain_run.glob(pattern)) or list(plain_run.glob(f"checkpoint-*/{pattern}"))
    for entry in plain_run.iterdir():
        assert entry.name in names or entry.name.startswith("checkpoint-")


def test_the_batch_script_and_the_doc_agree():
    script = (ROOT / "configs" / "slurm" / "sft.sbatch").read_text(encoding="utf-8")
    assert "USR1@600" in script and "Ten minutes" in section("Several nodes")

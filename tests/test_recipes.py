"""docs/recipes.md: each diff applies to this tree, is one file, and does what is said of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipe_checks import CHECKS

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^<!-- (\w+) -->\n```diff\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL))
NEEDED = ("vlm", "train", "tests/tiny.py", "tests/recipe_checks.py", "tests/train/runs.py")
NEEDED += ("tests/golden/model",)


def copy_tree(folder: Path) -> None:
    """What training a tiny model takes."""
    for name in NEEDED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)


def run(command: list[str], folder: Path, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_recipe_is_one_file():
    assert list(RECIPES) == list(CHECKS)
    assert DOC.count("```diff") == len(RECIPES)
    for name, diff in RECIPES.items():
        (changed,) = re.findall(r"^\+\+\+ b/(\S+)", diff, re.MULTILINE)
        assert (ROOT / changed).exists(), name
        assert f"`{changed}`" in DOC.split(f"<!-- {name} -->")[0].rpartition("\n## ")[2], name


@pytest.mark.parametrize("name", CHECKS)
def test_the_change_does_what_is_said(name, tmp_path):
    tree = tmp_path / "tree"
    copy_tree(tree)
    done = run(["git", "apply", "-"], tree, RECIPES[name])
    assert done.returncode == 0, f"docs/recipes.md, {name}: {done.stderr}"
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "tests.recipe_checks", name, str(tmp_path / "work")]
    done = run(command, tree)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", CHECKS)
def test_the_change_is_laid_out_as_our_code_is(name, tmp_path):
    copy_tree(tmp_path)
    assert run(["git", "apply", "-"], tmp_path, RECIPES[name]).returncode == 0
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    changed = re.search(r"^\+\+\+ b/(\S+)", RECIPES[name], re.MULTILINE)[1]
    for words in (["format", "--check"], ["check"]):
        done = run([sys.executable, "-m", "ruff", *words, changed], tmp_path)
        assert done.returncode == 0, done.stdout

"""docs/pitfalls.md: every row names tests, and there are such tests."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
WHY_NOT = "No test: "


def rows(text: str) -> list[list[str]]:
    """The tables' rows, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[-1] != "tests"]


ROWS = rows((ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8"))


@cache
def functions_of(path: Path) -> frozenset[str]:
    """Names of the test functions in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return frozenset(name for name in functions if name.startswith("test_"))


def missing(cell: str) -> list[str]:
    """Tests that a row names and nobody has written."""
    return [
        f"{file}::{name}"
        for file, name in TEST.findall(cell)
        if not (ROOT / file).exists() or name not in functions_of(ROOT / file)
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_row_has_tests_that_exist_or_a_reason(row):
    assert len(row) == 3, row
    pain, _, cell = row
    assert TEST.findall(cell) or cell.startswith(WHY_NOT), f"nothing tests: {pain}"
    assert missing(cell) == []
    rest = TEST.sub("", cell).strip()
    assert not rest or rest.startswith(WHY_NOT), f"not understood: {rest}"


def test_a_name_that_is_no_test_would_be_seen():
    assert missing("`tests/test_pitfalls.py::test_that_nobody_wrote`")
    assert missing("`tests/no_such_file.py::test_it`")
    assert len(ROWS) > 40


def test_every_figure_names_the_command_that_finds_it():
    """A result is written by the script of its name, or holds the command that gave it."""
    for result in sorted((ROOT / "bench" / "results").iterdir()):
        command = re.search(r"python -m|make \w+|pytest", result.read_text(encoding="utf-8"))
        assert (ROOT / "bench" / f"{result.stem}.py").exists() or command, result.name

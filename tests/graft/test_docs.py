"""docs/graft.md: its commands run on tiny donors, its table is what is derived."""

import re
import shlex
from pathlib import Path

import pytest

from serve import export, parity
from tests.graft.test_sizes import derive, vision_config
from tests.test_readme import commands
from tests.tiny import write_llm_donor, write_vision_donor
from vlm.graft.__main__ import DEFAULTS, choices, main

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/graft.md").read_text(encoding="utf-8")
MAINS = {"vlm.graft": main, "serve/export.py": export.main, "serve/parity.py": parity.main}
SMALLER = {"--llm_layers 32": "--llm_layers 2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Donors under the doc's names. Its literal commands need heads that make the hidden size."""
    folder = tmp_path_factory.mktemp("docs")
    write_vision_donor(folder / "donors/qwen2.5-vl-7b")
    write_llm_donor(folder / "donors/qwen3-8b", tie=False, hidden_size=128)
    return folder


def test_every_command_runs_in_the_docs_order(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ran = 0
    for command in commands(DOC):
        for large, small in SMALLER.items():
            command = command.replace(large, small)
        program, *arguments = shlex.split(command.replace("-m vlm.graft", "vlm.graft"))
        assert program == "python"
        if arguments[0] == "serve/parity.py":  # vLLM's part is tests/serve/test_literal.py's
            arguments += ["--engines", "transformers"]
        code = MAINS[arguments[0]](arguments[1:])
        assert code == 0, f"{command}\n{capsys.readouterr()}"
        ran += 1
    assert ran == 6


def test_the_config_table_is_what_is_derived_from_7b_and_8b():
    rows = re.findall(r"^\| (vision )?`(\w+)` \| (\w+) \| (\d+) \|$", DOC, re.MULTILINE)
    assert len(rows) == 9
    donor, hybrid = vision_config("7B"), derive("7B", "8B")
    for vision, key, before, after in rows:
        part = "vision_config" if vision else "text_config"
        source = donor["vision_config"] if vision else donor
        assert str(source.get(key, "absent")) == before
        assert hybrid[part][key] == int(after)


def test_the_merger_table_has_every_choice_and_the_default_first():
    (table,) = re.findall(r"^\| `--merger_init`.*?\n\n", DOC, re.MULTILINE | re.DOTALL)
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert tuple(listed) == choices("merger_init") and listed[0] == DEFAULTS.merger_init

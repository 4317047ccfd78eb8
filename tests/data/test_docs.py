"""docs/data.md: every example in it is loaded and encoded, as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.data.samples import processor, write_image
from tests.data.videos import write_video
from tests.tiny import write_hybrid
from vlm.data.sources import open_sources, parse_spec

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
ROWS = [block for language, block in BLOCKS if language == "json"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with all media that the examples name."""
    monkeypatch.chdir(tmp_path)
    for path in sorted(set(re.findall(r"[\w./]+\.(?:jpg|mp4)\b", TEXT))):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        if path.endswith("jpg"):
            write_image(tmp_path / path, 84, 112)
        else:
            write_video(tmp_path / path, 30, 84, 112, 25, "mp4v")
    return tmp_path


def samples(path):
    (source,) = open_sources([str(path)])
    return [
        source.parse(row, place)
        for chunk in source.chunks()
        for place, row in zip(chunk.places, chunk.rows, strict=True)
    ]


def test_the_guide_has_examples_of_everything():
    keys = {key for row in ROWS for key in json.loads(row)}
    assert keys >= {"messages", "conversations", "query", "instruction", "tools", "objects"}
    assert {language for language, _ in BLOCKS} == {"json", "python", "yaml", "bash"}


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_each_row_loads_as_a_line_and_in_an_array(folder, number):
    row = json.loads(ROWS[number])
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (folder / "data.json").write_text(f"[{ROWS[number]}]", encoding="utf-8")
    (line,), (element,) = samples("data.jsonl"), samples("data.json")
    assert line.messages == element.messages and line.images == element.images
    example = processor().encode(line)
    assert example.length > 10
    assert len(example.grid_thw) == len(line.images) + len(line.videos)


def test_all_rows_may_stand_in_one_file(folder):
    (folder / "data.json").write_text(f"[{','.join(ROWS)}]", encoding="utf-8")
    assert len(samples("data.json")) == len(ROWS)


def test_the_table_is_written_and_read(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (script,) = (block for language, block in BLOCKS if language == "python")
    exec(script, {})  # in `folder`
    (sample,) = samples("data.parquet")
    assert sample.images == ((folder / "pictures" / "cat.jpg").read_bytes(),)
    assert processor().encode(sample).grid_thw == ((1, 6, 8),)


def test_the_config_names_sources():
    (text,) = (block for language, block in BLOCKS if language == "yaml")
    first, second, third = map(parse_spec, yaml.safe_load(text)["dataset"])
    assert first.path == "captions.jsonl"
    assert (second.name, second.weight, second.limit) == ("documents", 0.5, 20000)
    assert (third.hub, third.split) == ("modelscope", "train")
    for key in vars(second):
        assert f"`{key}`" in TEXT  # every key has its line


def test_the_commands_run(folder):
    commands = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    assert len(commands) == 5
    write_hybrid(folder / "models/graft-8b")
    (folder / "data").mkdir(exist_ok=True)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "data/train.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRAFTVL_CACHE": str(folder / "cache")}
    for command in commands:
        _, *arguments = command.split()
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (folder / "page.html").exists() and (folder / "encoded.jsonl").exists()


def test_no_base64_stands_in_the_text():
    text = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"[\w+/]{60,}", text)

"""docs/serving.md: its examples run, its flags exist, its table is the defaults."""

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import httpx
import pytest

from serve import chat, export, parity
from serve.export_files import NO_THINKING
from serve.serve_config import ServeConfig, parse
from serve.web import parse_arguments as parse_web
from tests.serve.fake_endpoint import serving
from tests.test_readme import blocks, commands
from vlm.data.limits import Limits

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
PARSERS = {
    "serve/export.py": export.parse_arguments,
    "serve/parity.py": parity.parse_arguments,
    "serve/launch.py": parse,
    "serve/chat.py": chat.parse_arguments,
    "serve/web.py": parse_web,
}


def test_the_openai_example_runs(tmp_path, monkeypatch):
    (example,) = (code for code in blocks(DOC, "python") if "OpenAI(" in code)
    (tmp_path / "cat.jpg").write_bytes((ROOT / "tests/golden/images/exif3.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    with serving(models=("Qwen3-VL",)) as server, redirect_stdout(io.StringIO()) as printed:
        exec(example.replace("http://127.0.0.1:8000", server.url), {})
    (request,) = server.requests
    assert printed.getvalue().strip()
    image, text = request["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert "enable_thinking" in NO_THINKING and text["type"] == "text"


def test_the_curl_example_is_a_request_that_a_server_takes():
    (line,) = (line for line in commands(DOC) if line.startswith("curl"))
    words = shlex.split(line)
    with serving(models=("Qwen3-VL",)) as server:
        url = words[1].replace("http://127.0.0.1:8000", server.url)
        headers = dict([words[words.index("-H") + 1].split(": ")])
        headers |= {"Authorization": "Bearer EMPTY"}  # this one asks for a key
        answer = httpx.post(url, content=words[words.index("-d") + 1], headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("command", [c for c in commands(DOC) if c.startswith("python serve/")])
def test_every_command_has_flags_that_exist(command, monkeypatch):
    for variable in ("MAX_PIXELS", "VIDEO_MAX_PIXELS", "FPS_MAX_FRAMES"):
        monkeypatch.delenv(variable, raising=False)
    script, *arguments = shlex.split(command)[1:]
    PARSERS[script](arguments)


def test_the_table_is_the_launchers_defaults():
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", DOC, re.MULTILINE)
    defaults = ServeConfig(Path("x"))
    seen = 0
    for names, values in rows:
        listed = re.findall(r"`(\w+)`", names)
        if not hasattr(defaults, listed[0]):
            continue
        said = [value.strip() for value in values.split(", ")]
        recipe = [getattr(Limits, name, getattr(defaults, name)) for name in listed]
        assert said == [str(value) for value in recipe]
        seen += len(listed)
    assert seen == 11

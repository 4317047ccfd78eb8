"""`eval/run.py --serve`: a server for the length of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eval.result import read_result
from eval.run import main
from tests.eval import families
from tests.eval.native_runs import no_of
from tests.eval.test_run import ROWS, mine
from tests.serve.processes import living, wait_until
from tests.tiny import write_hybrid

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path) -> Path:
    return families.own(tmp_path / "data" / "held_out.jsonl", ROWS)


@pytest.fixture
def words(data, tmp_path, monkeypatch) -> list[str]:
    """A command line that serves an export, with a stand-in for vLLM."""
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    source = (ROOT / "tests" / "serve" / "fake_vllm.py").read_text()
    command.write_text(f"#!{sys.executable}\n{source}")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_RECORD", str(tmp_path / "record.json"))
    export = write_hybrid(tmp_path / "my-vlm")
    shutil.copyfile(export / "preprocessor_config.json", export / "video_preprocessor_config.json")
    given = ["custom", "--data_root", data, "--serve", export, "--results", tmp_path / "results"]
    return [str(word) for word in given]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_however_a_run_ends_its_server_ends_too(words, tmp_path, monkeypatch, number):
    monkeypatch.setenv("FAKE_VLLM", "hangs")
    process = subprocess.Popen([sys.executable, "eval/run.py", *words], cwd=ROOT)
    record = tmp_path / "record.json"
    assert wait_until(record.exists)
    process.send_signal(number)
    assert process.wait() != 0
    group = json.loads(record.read_text())["group"]
    assert wait_until(lambda: not living(group))


def test_a_server_of_ones_own_is_started_waited_for_and_stopped(words, tmp_path, capfd):
    assert main(words) == 2  # the stand-in lists no models
    assert "answers 404 Not Found to a list of models" in capfd.readouterr().err
    record = json.loads((tmp_path / "record.json").read_text())
    given = record["arguments"]
    assert given[given.index("--served-model-name") + 1] == "my-vlm"
    assert wait_until(lambda: not living(record["group"]))


def test_a_server_that_does_not_start(data, tmp_path, capfd):
    words = ["custom", "--data_root", data, "--serve", tmp_path, "--results", tmp_path / "results"]
    assert main([str(word) for word in words]) == 2
    assert f"error: {tmp_path} could not be served (see above)" in capfd.readouterr().err


@pytest.mark.slow
def test_with_vllm_itself(data, tmp_path, capfd):
    pytest.importorskip("vllm")
    from serve.export import ExportOptions, export

    folder = export(ExportOptions(write_hybrid(tmp_path / "model"), tmp_path / "my-vlm"))
    words = ["custom", "--data_root", data, "--serve", folder, "--results", tmp_path / "results"]
    yaml_file = mine(tmp_path, max_tokens=8)
    words[0] = yaml_file
    assert main([str(word) for word in words]) == 0
    place = tmp_path / "results" / "my-vlm" / "mine"
    result, samples = read_result(place)
    assert result.complete and result.n == 4 and result.model == "my-vlm"
    assert all(sample.truncated or sample.raw for sample in samples)
    assert [no_of(sample.question) for sample in samples] == [1, 2, 3, 4]
    before = (place / "result.json").read_bytes()
    assert main([str(word) for word in (*words, "--resume")]) == 0
    assert (place / "result.json").read_bytes() == before

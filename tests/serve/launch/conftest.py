"""What tests of the launcher share: a model, a stand-in for vLLM, launchers that are cleaned up."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.serve.processes import Launcher, free_port
from tests.tiny import write_hybrid


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with everything that an export has and the launcher looks at."""
    folder = write_hybrid(tmp_path_factory.mktemp("launch") / "model")
    shutil.copyfile(folder / "preprocessor_config.json", folder / "video_preprocessor_config.json")
    return folder


@pytest.fixture(autouse=True)
def fake_vllm(tmp_path, monkeypatch):
    """`vllm` on the PATH; returns where it writes down what it was given."""
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    source = Path(__file__).parents[1].joinpath("fake_vllm.py").read_text()
    command.write_text(f"#!{sys.executable}\n{source}")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_RECORD", str(tmp_path / "record.json"))
    for variable in ("MAX_PIXELS", "VIDEO_MAX_PIXELS", "FPS_MAX_FRAMES", "VLLM_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "record.json"


@pytest.fixture
def launch(model, tmp_path):
    """Starts launchers of the model on free ports; what a failed test leaves is killed."""
    started = []

    def start(*options: object, **variables: str) -> Launcher:
        options = (model, "--port", free_port(), *options)
        started.append(Launcher(tmp_path / "out", *options, **variables))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.wait()

"""A build that is killed leaves nothing under its name, and is finished by running it again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_llm_donor, write_vision_donor

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("killed.py")


@pytest.mark.parametrize("stride", [60, pytest.param(7, marks=pytest.mark.soak)])
def test_kill_9_at_any_moment(tmp_path, stride):
    donors = write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm")
    command = [sys.executable, SCRIPT, *donors, tmp_path / "builds", str(stride)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kills = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(kill["signal"] == 9 and kill["equal"] for kill in kills)
    moments = [kill["moment"] for kill in kills]
    assert {"os.mkdir hybrid.partial", "os.remove plan", "os.rename hybrid.partial"} <= set(moments)
    shards = {kill["shards"] for kill in kills}
    assert {0, 1, 2, 3} <= shards  # before the first, and between any two
    assert any(kill["begun"] for kill in kills)  # within one
    for kill in kills:
        if kill["final"]:  # whole already: only the lock was still there
            assert kill["moment"] == "os.remove hybrid.lock"
            continue
        assert kill["again"] == 0 and kill["left"] == ["hybrid"]
        # what is whole is not written twice; without its plan it belongs to nothing
        assert kill["reused"] == (
            0 if kill["moment"] == "os.rename hybrid.partial" else kill["shards"]
        )
        if kill["loadable"]:  # config.json comes last
            assert kill["shards"] == max(shards)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

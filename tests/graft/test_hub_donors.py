"""Donors by hub id: `build` downloads them, and the same command works offline afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

from serve.model_card import donor_name
from tests.fake_hub import fake_hub
from tests.tiny import write_llm_donor, write_vision_donor
from vlm.graft.stream import build

ROOT = Path(__file__).parents[2]


def command(folder: Path, out: Path, variables: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(sys.executable, "-m", "vlm.graft", "build", "--vision", "owner/vl"),
            *("--llm", "owner/llm", "--out", str(out)),
        ],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def test_hub_ids_are_taken_and_kept_for_offline_use(tmp_path):
    vision, llm = write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm")
    build(vision, llm, tmp_path / "local")
    with fake_hub() as hub:
        hub.add("owner/vl", vision)
        commit = hub.add("owner/llm", llm)
        variables = hub.environment(tmp_path)
        online = command(tmp_path, tmp_path / "online", variables)
    assert online.returncode == 0, online.stderr
    offline = command(tmp_path, tmp_path / "offline", variables | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("local", "online", "offline")
    ]
    assert weights[0] == weights[1] == weights[2]
    report = json.loads((tmp_path / "online" / "graft_report.json").read_text())
    assert donor_name(report["donors"]["llm"]["path"]) == f"owner/llm@{commit[:7]}"


def test_an_id_that_nobody_has_is_one_sentence(tmp_path):
    with fake_hub() as hub:
        failed = command(tmp_path, tmp_path / "out", hub.environment(tmp_path))
    assert failed.returncode == 2 and "owner/vl" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()

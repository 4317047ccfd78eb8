"""Coefficients of a device: measured, written, and what a step's time is predicted from."""

import json

import pytest

from tests.tiny import write_hybrid
from vlm.cost import calibrate
from vlm.cost.__main__ import main
from vlm.cost.calibrate import MODULES


def test_a_file_predicts_the_time_of_a_step(tmp_path, capsys):
    model, out, report = write_hybrid(tmp_path / "model"), tmp_path / "c.json", tmp_path / "r.json"
    asked = ["--model", str(model), "--stage", "2", "--dtype", "float32"]
    measured = ["--tokens", "256", "--side", "8", "--out", str(out)]
    assert calibrate.main([*asked, *measured]) == 0
    assert "a mixed micro-batch: " in capsys.readouterr().out
    found = json.loads(out.read_text())
    speeds = found["seconds_per_flop"]
    assert set(speeds) == set(MODULES) and all(value >= 0 for value in speeds.values())
    assert found["device"] and found["asked"]["recompute"] == "full"
    step = ["--tokens", "100", "--targets", "9", "--images", "56x56", "--gpus", "2"]
    assert main([*asked, *step, "--coefficients", str(out), "--json", str(report)]) == 0
    assert "at the speeds that were measured" in capsys.readouterr().out
    told = json.loads(report.read_text())["step"]
    expected = sum(speeds[name] * flops for name, flops in told["FLOPs by module"].items()) / 2
    assert told["seconds"] == pytest.approx(expected)
    others = ["--recompute", "none", *step, "--coefficients", str(out)]
    assert main([*asked, *others]) == 2
    assert "was measured for stage 2, recompute full, dtype float32" in capsys.readouterr().err


def test_another_file_is_refused(tmp_path, capsys):
    (tmp_path / "c.json").write_text("{}")
    asked = ["--model", str(write_hybrid(tmp_path / "model")), "--stage", "2"]
    step = ["--tokens", "100", "--targets", "9", "--coefficients", str(tmp_path / "c.json")]
    assert main([*asked, *step]) == 2
    assert "c.json is no file of python -m vlm.cost.calibrate" in capsys.readouterr().err

"""The miniature recipe gives the recorded losses and gradient norms, in both stages.

A change that is meant to change no number shows here that it does not. Where numbers are meant
to change, the curves are renewed by `python -m tests.train.golden_curves`, and the commit says
why; tests/golden/curves/README.md has more.
"""

import json

import pytest

from tests.train.golden_curves import CURVES, STAGES, train_both_stages

TOLERANCE = 1e-5
"""Relative. The same machine repeats every bit; without AVX, which sums in another order, the
largest difference found was 1.4e-6."""


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    return train_both_stages(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_curve_is_the_recorded_one(curves, stage):
    recorded = json.loads((CURVES / f"{stage}.json").read_text(encoding="utf-8"))
    assert [s["step"] for s in curves[stage]] == [s["step"] for s in recorded]
    for ours, golden in zip(curves[stage], recorded, strict=True):
        assert ours == pytest.approx(golden, rel=TOLERANCE), f"{stage}, step {golden['step']}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_recorded_curve_learns(stage):
    losses = [s["loss"] for s in json.loads((CURVES / f"{stage}.json").read_text("utf-8"))]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])

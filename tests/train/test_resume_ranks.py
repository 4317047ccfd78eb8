"""Another number of ranks, or another engine, goes on from the same checkpoint.

Within 1e-5 in float32: the terms of a sum are the same, in another order.
"""

import shutil

import pytest

from tests.train.engines import CONSTANT, RELAY, run_several
from tests.train.runs import log_of, run_plain, trainer_of, weights_of, write_config


@pytest.fixture(scope="module")
def relay(setting, two_ranks, tmp_path_factory):
    """A step each by ZeRO-1, ZeRO-2 offloaded and a file's settings on two ranks, by one plain
    process, by ZeRO-2 on two ranks, and by ZeRO-2 on four."""
    run = tmp_path_factory.mktemp("four") / "relay"
    shutil.copytree(two_ranks / "relay", run)
    run_several([write_config(setting, run, **CONSTANT)], 4)
    return run


def test_a_relay_continues_the_curve_of_one_process(setting, relay, tmp_path):
    whole = run_plain(setting, tmp_path / "run", **CONSTANT)
    ours, theirs = ([line["loss"] for line in log_of(run)] for run in (relay, whole))
    assert ours == pytest.approx(theirs, abs=1e-5)
    weights, expected = weights_of(relay, 6), weights_of(whole, 6)
    assert max((weights[n] - expected[n]).abs().max() for n in expected) < 1e-5


def test_every_leg_was_run_by_its_ranks(relay):
    """The last checkpoint of the relay on two ranks is by two, that of its end by four."""
    assert len(RELAY) == 5
    files = [list((relay / f"checkpoint-{step}" / "engine").iterdir()) for step in (5, 6)]
    assert list(map(len, files)) == [2, 4]
    assert trainer_of(relay, 6)["global_batch_size"] == 6

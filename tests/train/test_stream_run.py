"""Training on streamed data: the same end after a break, on any ranks, or a clear refusal."""

import json

import pytest

from tests.train.runs import (
    log_of,
    run_plain,
    run_ranks,
    run_until,
    same,
    trainer_of,
    weights_of,
    write_setting,
)
from tests.train.test_resume import close, engine_of, untimed
from train.config import TrainConfig, UsageError

STREAM = {"streaming": True, "stream_window": 2, "max_bad_fraction": 0.2}
"""An epoch is a step of six, a second of six and one of three: a whole window and a part."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of five or six samples, one of them bad."""
    folder = tmp_path_factory.mktemp("stream")
    setting = write_setting(folder)
    lines = (folder / "data.jsonl").read_text().splitlines()
    lines[7] = "{torn"
    for number in range(3):
        text = "\n".join(lines[number * 6 : number * 6 + 6]) + "\n"
        (folder / f"shard-{number}.jsonl").write_text(text)
    return setting | {"dataset": [str(folder / "shard-*.jsonl")]}


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """Six steps, which are two epochs."""
    return run_plain(shards, tmp_path_factory.mktemp("whole") / "run", **STREAM)


def test_six_steps_are_two_epochs_and_tell_the_bad_sample(whole):
    assert [line["samples"] for line in log_of(whole)] == [6, 6, 3, 6, 6, 3]
    assert [line["epoch"] for line in log_of(whole)] == [0, 0, 0, 1, 1, 1]
    (bad,) = (whole / "ledger.jsonl").read_text().splitlines()
    assert json.loads(bad)["id"].endswith("shard-1.jsonl:2")


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_stopped_run_ends_as_an_uninterrupted_one(shards, whole, tmp_path, step):
    """Within a window, at its end, at the epoch's end, in the second epoch; then with workers."""
    run = run_until(shards, tmp_path / "run", step, save_steps=step, **STREAM)
    assert len(log_of(run)) == step
    run_plain(shards, run, dataloader_num_workers=2, **STREAM)
    assert same(weights_of(run, 6), weights_of(whole, 6))
    assert same(engine_of(run, 6), engine_of(whole, 6))
    assert untimed(run) == untimed(whole)
    assert trainer_of(run, 6) == trainer_of(whole, 6)


def test_a_run_of_one_process_continues_on_two_ranks(shards, whole, tmp_path):
    run = run_until(shards, tmp_path / "run", 1, save_steps=1, **STREAM)
    run_ranks(shards, run, 2, **STREAM)
    assert close(run, whole)
    for ours, theirs in zip(log_of(run), log_of(whole), strict=True):
        assert (ours["samples"], ours["targets"]) == (theirs["samples"], theirs["targets"])


@pytest.mark.parametrize("change", [{"stream_window": 3}, {"max_length": 255}])
def test_what_would_change_the_batches_is_refused(shards, tmp_path, change):
    run = run_until(shards, tmp_path / "run", 1, save_steps=1, **STREAM)
    with pytest.raises(UsageError, match="the data differs"):
        run_plain(shards, run, **STREAM | change)


def test_a_stream_needs_max_steps(shards, tmp_path):
    with pytest.raises(UsageError, match="streaming needs max_steps"):
        TrainConfig(**shards, output_dir=tmp_path, streaming=True)

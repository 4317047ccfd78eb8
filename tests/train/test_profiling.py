"""A trace holds three steps, after two that warm up, and changes no number."""

import gzip
import json
from pathlib import Path

from tests.train.runs import run_plain, same, weights_of
from train.profiling import Profiler


def steps_of(run: Path) -> list[int]:
    """Numbers of the steps in a run's trace."""
    with gzip.open(run / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)
    names = {event.get("name", "") for event in events}
    return sorted(int(name.split("#")[1]) for name in names if name.startswith("ProfilerStep#"))


def test_three_steps_are_traced_and_no_number_changes(setting, plain_run, tmp_path):
    run = run_plain(setting, tmp_path / "run", profile=True)
    assert steps_of(run) == [2, 3, 4]
    assert same(weights_of(run, 6), weights_of(plain_run, 6))
    assert not (plain_run / "profile").exists()


def test_a_short_run_leaves_the_steps_it_had(setting, tmp_path):
    run = run_plain(setting, tmp_path / "run", profile=True, max_steps=4)
    assert steps_of(run)[:2] == [2, 3]  # and what the run does after its last step


def test_a_run_that_is_too_short_says_so(setting, tmp_path, capsys):
    run = run_plain(setting, tmp_path / "run", profile=True, max_steps=2)
    assert "nothing is traced" in capsys.readouterr().out
    assert not list((run / "profile").iterdir())


def test_the_other_ranks_write_nothing(tmp_path, capsys):
    with Profiler(tmp_path / "profile", enabled=False) as profiler:
        profiler.step()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out

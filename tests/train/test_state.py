"""The run on disk: broken checkpoints are passed over, old ones go, changed options are told."""

import re
import shutil
import time
from pathlib import Path

import pytest

import train.snapshot
from tests.train.runs import log_of, run_plain, run_until, same, weights_of
from train.config import UsageError

RANK = "engine/rank-00000.safetensors"


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory):
    """Six steps with checkpoints 2, 4 and 6; the last two can be resumed."""
    return run_plain(setting, tmp_path_factory.mktemp("whole") / "run", save_steps=2)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change(path: Path) -> None:
    """One bit in the midst."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    (cut, RANK, rf"{RANK} has \d+ bytes, \d+ were written"),
    (change, RANK, f"{RANK} has other bytes than were written"),
    (change, "model/model.safetensors", "model/model.safetensors has other bytes"),
    (Path.unlink, "model/tokenizer.json", "model/tokenizer.json is missing"),
    (Path.unlink, "trainer.json", "trainer.json is missing"),
    (Path.unlink, "checksums.json", "checksums.json is missing"),
    (cut, "checksums.json", "checksums.json cannot be read"),
    (shutil.rmtree, "engine", "it keeps its model alone"),
]


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES)
def test_a_broken_checkpoint_is_passed_over(setting, run, plain_run, capsys, damage, file, reason):
    damage(run / "checkpoint-6" / file)
    run_plain(setting, run, save_steps=2)
    (told,) = re.findall(r"checkpoint-6 cannot be resumed \((.*)", capsys.readouterr().out)
    assert re.match(reason, told)
    assert told.endswith("it is now checkpoint-6.broken, and the run goes on from checkpoint-4")
    assert (run / "checkpoint-6.broken").is_dir()  # nobody's work is removed
    assert same(weights_of(run, 6), weights_of(plain_run, 6))
    assert (run / "latest").read_text() == "checkpoint-6\n"


def test_no_checkpoint_is_whole(setting, run):
    for step in (4, 6):
        cut(run / f"checkpoint-{step}" / RANK)
    flaws = f"checkpoint-6: {RANK} has .*; checkpoint-4: {RANK} has .*; checkpoint-2: it keeps its"
    with pytest.raises(UsageError, match=f"no checkpoint that can be resumed \\({flaws}"):
        run_plain(setting, run)
    assert len(list(run.glob("checkpoint-*"))) == 3


def test_what_a_kill_left_is_cleared(setting, run):
    """Between rename and `latest`, and within a write or a deletion."""
    (run / "latest").write_text("checkpoint-4\n")
    (run / "checkpoint-2").rename(run / "checkpoint-2.partial")
    run_plain(setting, run)
    assert (run / "latest").read_text() == "checkpoint-6\n"
    assert not (run / "checkpoint-2.partial").exists()


def test_one_checkpoint_is_kept_and_resumed(setting, plain_run, tmp_path):
    """The one that a run was resumed from is gone when its files are needed again; what the user
    has put there stays."""
    options = {"save_steps": 1, "save_total_limit": 1}
    run = run_until(setting, tmp_path / "run", 2, **options)
    kept = ["checkpoint-1-copy", "checkpoint-1-copy.partial"]
    for name in kept:
        shutil.copytree(run / "checkpoint-2", run / name)
    run_plain(setting, run, **options)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [*kept, "checkpoint-6"]
    assert (run / "checkpoint-6/model/tokenizer.json").exists()
    assert same(weights_of(run, 6), weights_of(plain_run, 6))


def test_changed_options_are_told(setting, run, capsys):
    shutil.rmtree(run / "checkpoint-6")
    run_plain(setting, run, save_steps=3, learning_rate=1e-4)
    told = "options that differ from those of the last start: "
    changes = f"{told}.*learning_rate: 0.001 -> 0.0001, save_steps: 2 -> 3\n"
    assert re.search(changes, capsys.readouterr().out)
    run_plain(setting, run, save_steps=3, learning_rate=1e-4)
    assert told not in capsys.readouterr().out


def test_a_refused_start_keeps_the_options(setting, run):
    before = (run / "config.yaml").read_text()
    with pytest.raises(UsageError, match="was started with seed 42"):
        run_plain(setting, run, seed=1)
    assert (run / "config.yaml").read_text() == before


def test_training_goes_on_while_a_checkpoint_is_written(setting, plain_run, tmp_path, monkeypatch):
    """The files of step 3 are written after step 5, and hold the state of step 3."""
    run, honest, steps = tmp_path / "run", train.snapshot.write_tensors, []

    def write_later(path: Path, tensors: dict) -> None:
        until = time.monotonic() + 60
        while log_of(run)[-1]["step"] < 5 and time.monotonic() < until:
            time.sleep(0.01)
        steps.append(log_of(run)[-1]["step"])
        honest(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(train.snapshot, "write_tensors", write_later)
        run_plain(setting, run, save_steps=3)
    assert steps[0] == 5
    shutil.rmtree(run / "checkpoint-6")
    run_plain(setting, run)
    assert same(weights_of(run, 6), weights_of(plain_run, 6))

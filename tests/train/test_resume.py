"""Exact resume: N steps equal k steps, a break and N - k more, by the same command.

One world size: bit for bit, in float32. Another world size sums the same terms in another
order, so there the tolerances of test_step.py hold.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.runs import (
    command,
    damage,
    launch,
    log_of,
    run_plain,
    run_ranks,
    run_until,
    same,
    trainer_of,
    weights_of,
    write_setting,
)
from tests.train.test_step import LOSS, WEIGHT
from train.checksums import CHECKSUMS, checksums
from train.config import UsageError
from train.engine import MOMENTS

KILLED = Path(__file__).with_name("killed.py")
TIMES = {"seconds", "tokens_per_second", "samples_per_second", "useful_tflops_per_second"}
TIMES |= {"data_wait", "rank_wait", "save_wait", "memory_gb", "eta_seconds"}


def engine_of(run: Path, step: int) -> dict:
    """Fragments of all ranks."""
    files = sorted((run / f"checkpoint-{step}" / "engine").iterdir())
    pairs = ((file.name, key, tensor) for file in files for key, tensor in load_file(file).items())
    return {(name, key): tensor for name, key, tensor in pairs if "|" in key}


def edited(checkpoint: Path) -> None:
    """Its files were changed on purpose: their checksums follow."""
    path = checkpoint / CHECKSUMS
    files = (p for p in checkpoint.rglob("*") if p.is_file() and p != path)
    path.write_text(json.dumps(checksums(checkpoint, files)))


def untimed(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in log_of(run)]


def close(run: Path, reference: Path) -> bool:
    pairs = zip(log_of(run), log_of(reference), strict=True)
    losses = max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs)
    ours, theirs = weights_of(run, 6), weights_of(reference, 6)
    return losses < LOSS and max((ours[n] - theirs[n]).abs().max() for n in theirs) < WEIGHT


@pytest.mark.parametrize("step", [2, 3])
def test_a_stopped_run_ends_as_an_uninterrupted_one(setting, plain_run, tmp_path, step):
    """Step 3 ends the first epoch, step 2 lies inside it."""
    run = run_until(setting, tmp_path / "run", step, save_steps=step)
    assert len(log_of(run)) == step
    run_plain(setting, run, save_steps=step)
    assert same(weights_of(run, 6), weights_of(plain_run, 6))
    assert same(engine_of(run, 6), engine_of(plain_run, 6))
    assert untimed(run) == untimed(plain_run)  # no line lost, none twice


def test_without_the_moments_the_end_would_differ(setting, plain_run, tmp_path):
    """The comparison above can fail: a checkpoint whose moments are zero ends elsewhere."""
    run = run_until(setting, tmp_path / "run", 3, save_steps=3)
    file = run / "checkpoint-3" / "engine" / "rank-00000.safetensors"
    state = load_file(file)
    moments = {key: torch.zeros_like(t) for key, t in state.items() if "|exp_avg" in key}
    save_file(state | moments, file)
    edited(run / "checkpoint-3")
    run_plain(setting, run)
    assert not same(weights_of(run, 6), weights_of(plain_run, 6))


@pytest.mark.slow
def test_two_ranks_killed_while_saving_resume_exactly(setting, two_rank_run, tmp_path):
    """kill -9 of a rank ends the others; the torn checkpoint is not there; the rest is exact."""
    run, options = tmp_path / "run", {"save_steps": 2, "dataloader_num_workers": 1}
    killed = launch(command(setting, run, 2, script=KILLED, **options), KILL_AT="4")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert [p.name for p in run.glob("checkpoint-?")] == ["checkpoint-2"]
    assert (run / "checkpoint-4.partial").is_dir()
    assert (run / "latest").read_text().strip() == "checkpoint-2"
    run_ranks(setting, run, 2, **options)
    assert same(weights_of(run, 6), weights_of(two_rank_run, 6))
    assert same(engine_of(run, 6), engine_of(two_rank_run, 6))
    assert untimed(run) == untimed(two_rank_run)


def test_a_checkpoint_of_two_ranks_continues_on_one(setting, plain_run, two_rank_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two_rank_run, run)
    shutil.rmtree(run / "checkpoint-6")
    assert len(list((run / "checkpoint-4" / "engine").iterdir())) == 2
    run_plain(setting, run)
    assert trainer_of(run, 6)["global_batch_size"] == 6
    assert close(run, plain_run)


def test_stage_1_of_one_process_continues_on_two_ranks(tmp_path):
    """One sample a micro-batch: ranks with text alone stand beside ranks with images, and a
    sample found bad by one rank only changes the denominator of both."""
    setting = write_setting(tmp_path / "setting")
    damage(tmp_path / "setting" / "6-0.png")
    options = {"freeze_vit": True, "freeze_llm": True, "per_device_train_batch_size": 1}
    options |= {"max_bad_fraction": 0.1}
    whole = run_plain(setting, tmp_path / "whole", **options)
    run = run_until(setting, tmp_path / "run", 1, save_steps=1, **options)
    run_ranks(setting, run, 2, **options)
    assert close(run, whole)
    for ours, theirs in zip(log_of(run), log_of(whole), strict=True):
        assert (ours["samples"], ours["targets"]) == (theirs["samples"], theirs["targets"])
    (bad,) = (run / "ledger.jsonl").read_text().splitlines()
    assert json.loads(bad)["id"].endswith("data.jsonl:7")


def test_fragments_cut_anywhere_are_read_back(setting, plain_run, tmp_path):
    """As seven ranks would have written them, with cuts inside the parameters."""
    run = run_until(setting, tmp_path / "run", 3, save_steps=3)
    folder = run / "checkpoint-3" / "engine"
    whole = load_file(folder / "rank-00000.safetensors")
    (folder / "rank-00000.safetensors").unlink()
    rng = whole.pop("rng")
    shares = [{"rng": rng} for _ in range(7)]
    for key, tensor in whole.items():
        name, start = key.rsplit("|", 1)
        for rank, piece in enumerate(tensor.tensor_split(7)):
            if len(piece):
                shares[rank][f"{name}|{start}"] = piece.clone()
                start = int(start) + len(piece)
    for rank, share in enumerate(shares):
        save_file(share, folder / f"rank-{rank:05d}.safetensors")
    edited(folder.parent)
    run_plain(setting, run)
    assert same(weights_of(run, 6), weights_of(plain_run, 6))


def test_a_missing_fragment_is_named(setting, tmp_path):
    """Before anything is written."""
    run = run_until(setting, tmp_path / "run", 3, save_steps=3)
    file = run / "checkpoint-3" / "engine" / "rank-00000.safetensors"
    state = load_file(file)
    del state["lm_head.weight|exp_avg|0"]
    save_file(state, file)
    edited(run / "checkpoint-3")
    kept = [(run / name).read_bytes() for name in ("config.yaml", "log.jsonl")]
    with pytest.raises(UsageError, match=r"holds 0 of 196608 values of lm_head.weight \(exp_avg\)"):
        run_plain(setting, run, logging_steps=2)
    assert kept == [(run / name).read_bytes() for name in ("config.yaml", "log.jsonl")]


def test_what_a_checkpoint_holds(setting, tmp_path):
    """model/ in the hub's layout, engine/ of the last two, safetensors and JSON only."""
    run = run_plain(setting, tmp_path / "run", save_steps=1, save_total_limit=3)
    names = ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    assert sorted(p.name for p in run.glob("checkpoint-*")) == names
    assert [(run / name / "engine").exists() for name in names] == [False, True, True]
    assert (run / "latest").read_text().strip() == "checkpoint-6"
    files = {p.name for p in (run / "checkpoint-6").rglob("*") if p.is_file()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "trainer.json"} <= files
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja"}
    state = engine_of(run, 6)
    assert {key.split("|")[1] for _, key in state} == {"master", *MOMENTS}
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_other_data_is_refused(setting, tmp_path):
    run = run_until(setting, tmp_path / "run", 3, save_steps=3)
    longer = tmp_path / "longer.jsonl"
    line = json.dumps({"messages": [{"role": r, "content": "word"} for r in ("user", "assistant")]})
    longer.write_text((line + "\n") * 16)
    with pytest.raises(UsageError, match="the data differs"):
        run_plain(setting | {"dataset": [str(longer)]}, run)


def test_a_finished_run_stays_as_it_is(setting, plain_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain_run, run)
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoint-6").rglob("*")}
    run_plain(setting, run)
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoint-6").rglob("*")} == before
    assert log_of(run) == log_of(plain_run)

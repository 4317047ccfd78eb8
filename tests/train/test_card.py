"""The card tells what a run's files hold, and keeps what people have written into it."""

import hashlib
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.train.runs import log_of, run_plain, run_until, trainer_of
from train.card import hardware, main, make_card, throughput, write_card
from train.config import UsageError
from train.report import summarise


def card_of(run):
    return yaml.safe_load((run / "card.yaml").read_text())


def test_a_finished_run_has_its_card(plain_run):
    card, lines = card_of(plain_run), log_of(plain_run)
    assert (card["steps"], card["of_steps"], card["updates"]) == (6, 6, 6)
    assert (card["checkpoint"], card["resumed"]) == ("checkpoint-6", [])
    losses = card["training_loss"]
    assert (losses["first"], losses["last"]) == (lines[0]["loss"], lines[-1]["loss"])
    text = (plain_run / "config.yaml").read_bytes()
    assert card["config_sha256"] == hashlib.sha256(text).hexdigest()
    assert card["data_fingerprint"] == trainer_of(plain_run, 6)["data"]
    assert card["hardware"] == "1 x cpu" and card["versions"]["torch"] == torch.__version__
    assert (card["steps_refused"], card["steps_skipped"], card["bad_samples"]) == (0, 0, 0)
    assert (card["resume_check"], card["known_failures"], card["held_out"]) == (None, [], {})


def test_throughput_is_over_all_steps():
    """The second line took three times as long as the first."""
    first = {"seconds": 1, "tokens": 100, "samples": 1, "data_wait": 0.5, "mfu": 0.1}
    second = {"seconds": 3, "tokens": 100, "samples": 1, "data_wait": 0.1, "mfu": 0.5}
    figures = throughput([first, second])
    assert (figures["tokens_per_second"], figures["samples_per_second"]) == (50, 0.5)
    assert (figures["data_wait"], figures["mfu"]) == (0.2, 0.4)
    assert figures["rank_wait"] is None  # a log of before it was measured
    assert throughput([]) is None


def test_resumes_are_listed_and_checked(setting, plain_run, tmp_path, capsys):
    """Interrupted and resumed, it ends with the weights of the run that was not."""
    run = run_until(setting, tmp_path / "run", 4, save_steps=4)
    run_plain(setting, run, save_steps=4)
    (resumed,) = card_of(run)["resumed"]
    assert resumed["step"] == 4 and resumed["ranks"] == 1
    assert main([str(run), "--same_as", str(plain_run)]) == 0
    assert capsys.readouterr().out.endswith("\ncheckpoint-6: weights equal\n")
    check = card_of(run)["resume_check"]
    assert check["weights_equal"] and check["max_abs_difference"] == 0

    file = run / "checkpoint-6" / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.language_model.norm.weight"][0] += 0.5
    save_file(weights, file)
    assert main([str(run), "--same_as", str(plain_run)]) == 1
    assert capsys.readouterr().out == "checkpoint-6: weights differ by up to 0.500\n"
    check = card_of(run)["resume_check"]
    assert not check["weights_equal"] and check["max_abs_difference"] == pytest.approx(0.5)

    (run / "latest").write_text("checkpoint-4\n")
    assert main([str(run), "--same_as", str(plain_run)]) == 2
    told = capsys.readouterr().err
    assert "do not end at the same step (checkpoint-4, checkpoint-6)" in told
    assert main([str(run), "--same_as", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} is no directory" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(run), "--same_as", str(tmp_path / "empty")]) == 2
    assert f"{tmp_path / 'empty'} has no checkpoint" in capsys.readouterr().err


def test_a_start_that_trains_nothing_changes_no_record(setting, tmp_path, capsys):
    run = run_plain(setting, tmp_path / "run", max_steps=2)
    records = ("config.yaml", "log.jsonl", "card.yaml")
    before = [(run / name).read_bytes() for name in records]
    capsys.readouterr()
    run_plain(setting, run, max_steps=2, learning_rate=1e-4)
    assert "nothing is left to train: options given now are not applied" in capsys.readouterr().out
    run_plain(setting, run, max_steps=1)
    told = "the run is at step 2, beyond max_steps 1: options given now are not applied"
    assert told in capsys.readouterr().out
    assert before == [(run / name).read_bytes() for name in records]
    assert (card_of(run)["steps"], card_of(run)["of_steps"]) == (2, 2)


def start(step: int, total: int = 30, ranks: int = 1) -> dict:
    about = {"time": "t", "command": "c", "ranks": ranks, "device": "cpu", "revision": None}
    return {"event": "start", "step": step, "total_steps": total, "versions": {}} | about


def test_a_longer_run_lists_its_resumes_and_a_log_with_idle_starts_does_not(run):
    lines = [start(0, 10), start(10, 10), start(10, 30), start(30, 8)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = make_card(run)
    assert [one["step"] for one in card["resumed"]] == [10] and card["of_steps"] == 30


def test_hardware_that_changed_is_told():
    assert hardware([]) is None
    assert hardware([start(0), start(20)]) == "1 x cpu"
    assert hardware([start(0, ranks=2), start(20)]) == "2 x cpu, from step 20 on 1 x cpu"
    # all steps of the second start were taken again
    again = [start(0, ranks=2), start(20, ranks=4), start(10)]
    assert hardware(again) == "2 x cpu, from step 10 on 1 x cpu"


def test_what_trains_and_the_budgets_in_force_are_told(setting, tmp_path):
    """Patterns and `auto_budget` decide them, not the options that speak of parts or budgets."""
    options = {"freeze_vit": True, "freeze_llm": True, "last_vit_layers": 1, "auto_budget": True}
    run = run_plain(setting, tmp_path / "run", max_steps=1, **options)
    card, budget = card_of(run), json.loads((run / "budget.json").read_text())
    assert card["micro_batch_budget"] == {name: budget[name] for name in ("tokens", "patches")}
    vit, aligner, llm = (card["trains"][part] for part in ("vit", "aligner", "llm"))
    assert 0 < vit["trained"] < vit["of"] and aligner["trained"] == aligner["of"] > 0
    assert llm["trained"] == 0 < llm["of"]
    page = (run / "report.html").read_text()
    assert f"vit: {vit['trained']:,} of {vit['of']:,} parameters train" in page
    assert "frozen: llm ·" in page and f"{budget['tokens']:,} tokens" in page
    assert "<dt>token_budget" not in page


def test_what_people_wrote_stays(setting, tmp_path):
    run = run_plain(setting, tmp_path / "run", max_steps=1)
    card = card_of(run) | {"known_failures": ["upside-down digits"], "resume_check": {"a": 1}}
    (run / "card.yaml").write_text(yaml.safe_dump(card | {"steps": 99}))
    assert write_card(run) == card_of(run) == card


@pytest.fixture
def run(tmp_path):
    """A run's directory of which only the options are there."""
    (tmp_path / "config.yaml").write_text("model: m\ndtype: float32\ndataset: [a.jsonl]\n")
    return tmp_path


@pytest.mark.parametrize("text", ["known_failures: [a\n", "- upside-down digits\n"])
def test_a_card_that_cannot_be_read_stays_and_ends_no_run(run, capsys, text):
    (run / "card.yaml").write_text(text)
    summarise(run)
    said = capsys.readouterr()
    assert said.out == f"report: {run / 'report.html'}\n" and (run / "report.html").exists()
    assert said.err.count("\n") == 1 and f"no card: {run / 'card.yaml'} is no" in said.err
    assert (run / "card.yaml").read_text() == text
    assert main([str(run)]) == 2


def test_an_empty_card_is_written_anew(run, capsys):
    (run / "card.yaml").write_text("")
    summarise(run)
    assert card_of(run)["known_failures"] == [] and not capsys.readouterr().err


def test_torn_answers_end_no_run(run, capsys):
    answer = {"step": 0, "id": "a", "question": "q", "images": [], "truth": "t", "answer": "t"}
    (run / "answers.jsonl").write_text(f'{json.dumps(answer)}\n{{"step": 1, "id')
    summarise(run)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and card_of(run)["run"] == run.name
    assert f"no report: {run / 'answers.jsonl'}:2 is no answer" in said.err


def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"is no run: .*config.yaml"):
        make_card(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

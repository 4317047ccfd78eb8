"""The card tells what a run's files hold, and keeps what people have written into it."""

import hashlib
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.train.runs import log_of, run_plain, run_until, trainer_of
from train.card import main, make_card, throughput, write_card
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
    check = card_of(run)["resume_check"]
    assert check["weights_equal"] and check["max_abs_difference"] == 0

    file = run / "checkpoint-6" / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.language_model.norm.weight"][0] += 0.5
    save_file(weights, file)
    assert main([str(run), "--same_as", str(plain_run)]) == 0
    check = card_of(run)["resume_check"]
    assert not check["weights_equal"] and check["max_abs_difference"] == pytest.approx(0.5)

    (run / "latest").write_text("checkpoint-4\n")
    assert main([str(run), "--same_as", str(plain_run)]) == 2
    assert "do not end at the same step" in capsys.readouterr().err


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

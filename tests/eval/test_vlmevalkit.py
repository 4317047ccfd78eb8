"""eval/vlmevalkit.py with outcomes that VLMEvalKit gave; test_vlmevalkit_real.py runs it itself."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eval import vlmevalkit
from eval.benchmarks import load
from eval.options import Judge, Options
from eval.result import EvalError
from eval.vlmevalkit_figures import read_figures
from eval.vlmevalkit_journal import EMPTY, FAILED, Journal, key_of, said

FIXTURES = Path(__file__).parent / "fixtures"
OUTCOMES = FIXTURES / "outcomes"


@pytest.fixture
def options(tmp_path, monkeypatch) -> Options:
    """With the stand-in for the worker, which gives the outcome of MMMU."""
    monkeypatch.setattr(vlmevalkit, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(vlmevalkit, "WORKER", (str(FIXTURES / "stand_in_worker.py"),))
    monkeypatch.setenv("STAND_IN", str(OUTCOMES / "mmmu.json"))
    return Options(
        api_base="http://127.0.0.1:1/v1", model="org/vl", checkpoint="mine", folder=tmp_path / "out"
    )


def outcome(name: str) -> dict:
    return json.loads((OUTCOMES / f"{name}.json").read_text(encoding="utf-8"))


def test_the_config_is_the_recipes(options):
    settings = vlmevalkit.task_settings(
        load("mmmu_recipe"), replace(options, concurrency=64, limit=5)
    )
    assert settings == {
        "eval_backend": "VLMEvalKit",
        "eval_config": {
            "data": ["MMMU_DEV_VAL"],
            "mode": "all",
            "model": [
                {
                    "api_base": "http://127.0.0.1:1/v1/chat/completions",
                    "key": "EMPTY",
                    "name": "CustomAPIModel",
                    "type": "org/vl",
                    "temperature": 0.6,
                    "max_tokens": 512,
                    "img_size": -1,
                    "video_llm": False,
                    "timeout": 600.0,
                    "retry": 3,
                }
            ],
            "nproc": 64,
            "judge": "exact_matching",
            "limit": 5,
            "reuse": True,
        },
        "work_dir": str(options.folder / "backend" / "run"),
        "no_timestamp": True,
    }
    thinking = vlmevalkit.task_settings(replace(load("mmmu_recipe"), thinking=False), options)
    (model,) = thinking["eval_config"]["model"]
    assert model["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_worker_is_told_everything_and_nothing_else(options, tmp_path, monkeypatch):
    for name in vlmevalkit.OF_THE_LIBRARY:
        monkeypatch.setenv(name, "set by somebody")
    values = vlmevalkit.environment(replace(options, api_key="k", data_root=tmp_path))
    left = set(vlmevalkit.OF_THE_LIBRARY) & set(values)
    assert left == {"LMUData", "PRED_FORMAT", "SPLIT_THINK"}
    assert (values["LMUData"], values["PRED_FORMAT"]) == (str(tmp_path), "tsv")
    assert values["MODEL_API_KEY"] == "k"
    judged = replace(options, judge=Judge("http://127.0.0.1:2/v1", "judge", "j"), api_key="k")
    values = vlmevalkit.environment(judged)
    assert values["OPENAI_API_BASE"] == "http://127.0.0.1:2/v1/chat/completions"
    assert (values["LOCAL_LLM"], values["OPENAI_API_KEY"]) == ("judge", "j")
    assert values["MODEL_API_KEY"] == "k"
    config = vlmevalkit.task_settings(load("mmvet"), judged)["eval_config"]
    assert config["judge"] is None  # each dataset's own choice, which LOCAL_LLM stands for


def test_what_cannot_be_run_says_what_to_do(options, tmp_path, monkeypatch):
    with pytest.raises(EvalError, match="by a judge; name one with --judge URL,MODEL"):
        vlmevalkit.run(load("mathvista"), options)
    monkeypatch.setattr(vlmevalkit, "PYTHON", tmp_path / "none")
    with pytest.raises(EvalError, match="make eval_vlmevalkit"):
        vlmevalkit.run(load("mmmu_recipe"), options)


def test_a_whole_run(options):
    result, samples = vlmevalkit.run(load("mmmu_recipe"), options)
    assert result.complete and (result.n, result.score) == (8, pytest.approx(62.5))
    assert result.backend == "vlmevalkit" and "0.0.19" in result.backend_version
    assert result.subsets["validation"] == {"score": 50.0, "n": 6}
    assert (result.unparsed, result.truncated) == (2 / 8, 1 / 8)
    assert any("dev 100.00 (n 2), validation 50.00 (n 6)" in note for note in result.notes)
    assert result.protocol["temperature"] == 0.6 and result.protocol["judge"] == "exact_matching"
    by_id = {sample.id: sample for sample in samples}
    assert by_id["5"].raw.startswith("<think>") and by_id["5"].extracted == "A"
    assert (by_id["7"].raw, by_id["7"].truncated, by_id["7"].extracted) == ("", True, None)
    assert (by_id["8"].gold, by_id["8"].extracted) == ("42", "42")


def test_thoughts_in_a_field_of_their_own_are_part_of_the_answer(options, tmp_path, monkeypatch):
    given = outcome("mmmu")
    given["samples"][0]["answer"] |= {"content": "A", "thoughts": "red?"}
    (tmp_path / "given.json").write_text(json.dumps(given))
    monkeypatch.setenv("STAND_IN", str(tmp_path / "given.json"))
    _, samples = vlmevalkit.run(load("mmmu_recipe"), options)
    assert samples[0].raw == "<think>\nred?\n</think>\n\nA"


def test_failed_answers_take_the_score_away(options, monkeypatch):
    monkeypatch.setenv("STAND_IN", str(OUTCOMES / "mmmu_failed.json"))
    result, samples = vlmevalkit.run(load("mmmu_recipe"), options)
    assert outcome("mmmu_failed")["figures"]  # the library gives one
    assert (result.complete, result.score, result.subsets) == (False, None, {})
    assert (result.n, result.errored, result.missing) == (8, 2, 0)
    failed = [sample for sample in samples if sample.error]
    assert [sample.id for sample in failed] == ["4", "5"]
    assert all("HTTP 500" in s.error and s.score is None and s.raw == "" for s in failed)


def test_a_run_that_ended_early_has_missing_samples(options, tmp_path, monkeypatch):
    given = outcome("mmmu")
    for sample in given["samples"][6:]:
        sample.update(missing=True, answer=None, score=None, extracted=None)
    (tmp_path / "given.json").write_text(json.dumps(given))
    monkeypatch.setenv("STAND_IN", str(tmp_path / "given.json"))
    result, _ = vlmevalkit.run(load("mmmu_recipe"), options)
    assert (result.complete, result.score, result.missing) == (False, None, 2)


def test_a_worker_that_dies_is_told_with_its_last_words_and_without_the_key(options, monkeypatch):
    monkeypatch.setenv("STAND_IN", "crash")
    with pytest.raises(EvalError, match=r"code 9 \(Killed by a test\).*--resume"):
        vlmevalkit.run(load("mmmu_recipe"), replace(options, api_key="s3cret"))
    log = vlmevalkit.log_of(options).read_text(encoding="utf-8")
    assert "API Key: ***" in log and "s3cret" not in log and "@progress" not in log


def test_files_of_an_earlier_run_are_gone_and_answers_are_kept_only_to_resume(options, monkeypatch):
    def found(**changes) -> list[str]:
        vlmevalkit.run(load("mmmu_recipe"), replace(options, **changes))
        return json.loads((options.backend_folder / "found.json").read_text())

    first = found()
    assert not {"run", "outcome.json", "answers.jsonl"} & set(first)
    resumed = set(found(resume=True))
    assert "answers.jsonl" in resumed and not {"run", "outcome.json"} & resumed
    assert "answers.jsonl" not in found()
    monkeypatch.setenv("STAND_IN", "crash")  # no outcome is that of the run before
    with pytest.raises(EvalError):
        found(resume=True)


@pytest.mark.parametrize(
    ("recorded", "benchmark", "score", "n"),
    [
        ("mmbench", "mmbench_en", 50, 2),
        ("chartqa", "chartqa", 60, 5),
        ("pope", "pope", 100 / 3, 6),
        ("ocrbench", "ocrbench", 200 / 3, 3),
        ("mmvet", "mmvet", 55, 2),
        ("mathvista", "mathvista", 75, 4),
    ],
)
def test_figures_of_every_form(options, monkeypatch, recorded, benchmark, score, n):
    monkeypatch.setenv("STAND_IN", str(OUTCOMES / f"{recorded}.json"))
    judged = replace(options, judge=Judge("http://127.0.0.1:2/v1", "judge"))
    result, samples = vlmevalkit.run(load(benchmark), judged)
    assert result.complete and result.n == n
    assert result.score == pytest.approx(score)
    assert all(part["n"] <= len(samples) for part in result.subsets.values())


def test_figures_of_videos():
    rows = [{"split": "", "subset": kind} for kind in ("short", "long", "long")]
    both = {"type": "Video-MCQ", "samples": rows}
    nested = {"short": {"overall": "1.000"}, "long": {"overall": "0.500"}}
    figures = {"figures": {**nested, "overall": {"overall": "0.667"}}, **both}
    score, subsets, _ = read_figures(load("video_mme"), figures)
    assert score == pytest.approx(66.7) and subsets["long"] == {"score": 50.0, "n": 2}
    counts = {"short": [1, 1, "100.00%"], "long": [1, 2, "50.00%"], "overall": [2, 3, "66.67%"]}
    score, subsets, _ = read_figures(load("mvbench"), {"figures": counts, **both})
    assert score == pytest.approx(200 / 3) and subsets["short"] == {"score": 100.0, "n": 1}


@pytest.mark.parametrize("overall", [float("nan"), 1.2, "none"])
def test_figures_that_cannot_be_meant_are_refused(overall):
    figures = [{"split": "none", "Overall": overall}]
    with pytest.raises(EvalError, match="in no form known here"):
        read_figures(load("mmstar"), {"figures": figures, "type": "MCQ", "samples": [{}]})


@pytest.mark.parametrize("score", [-1, 1.5])
def test_a_score_that_is_none_is_refused(options, tmp_path, monkeypatch, score):
    given = outcome("mmmu")
    given["samples"][3]["score"] = score
    (tmp_path / "given.json").write_text(json.dumps(given))
    monkeypatch.setenv("STAND_IN", str(tmp_path / "given.json"))
    with pytest.raises(EvalError, match=rf"sample 4 with {score}, .* no score"):
        vlmevalkit.run(load("mmmu_recipe"), options)
    given["samples"][3].update(error="HTTP 500", answer=None)  # no answer has no score at all
    (tmp_path / "given.json").write_text(json.dumps(given))
    result, samples = vlmevalkit.run(load("mmmu_recipe"), options)
    assert result.errored == 1 and samples[3].score is None


def test_an_empty_answer_is_no_failure_but_a_judges_is():
    for content in (None, "", " \n"):
        assert said(content, judge=False, failed=FAILED) == EMPTY
        assert said(content, judge=True, failed=FAILED) == FAILED
    assert said(" A\n", judge=False, failed=FAILED) == said("A", judge=True, failed=FAILED) == "A"


def test_the_protocol_says_what_is_measured(options):
    benchmark = load("pope")
    protocol = vlmevalkit.protocol(benchmark, options)
    assert (protocol["metric"], protocol["scale"]) == (benchmark.metric, benchmark.scale)
    other = vlmevalkit.protocol(replace(benchmark, metric="accuracy"), options)
    assert {key for key in protocol if protocol[key] != other[key]} == {"metric"}


def test_the_librarys_own_error_and_a_judge_that_fails(options, tmp_path, monkeypatch):
    given = tmp_path / "given.json"
    monkeypatch.setenv("STAND_IN", str(given))
    given.write_text(json.dumps(outcome("mmmu") | {"figures": None, "error": "no such column"}))
    with pytest.raises(EvalError, match="could not run MMMU_DEV_VAL: no such column"):
        vlmevalkit.run(load("mmmu_recipe"), options)
    given.write_text((OUTCOMES / "mmvet_judge_failed.json").read_text())
    judged = replace(options, judge=Judge("http://127.0.0.1:2/v1", "judge"))
    with pytest.raises(EvalError, match=r"the judge gave no answer to \d+ .*HTTP 500.*--resume"):
        vlmevalkit.run(load("mmvet"), judged)


def test_the_journal_gives_each_answer_once_and_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path / "answers.jsonl")
    journal.add("a", {"content": "first"}, "stop")
    journal.add("a", {"content": None, "reasoning": "hm"}, "length")
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "b", "cont')
    journal = Journal(tmp_path / "answers.jsonl")
    journal.add("c", {"content": "after"}, "stop")
    assert journal.take("c") is None  # of this run
    assert journal.take("a")["content"] == "first"
    second = journal.take("a")
    assert (second["content"], second["thoughts"], second["finish_reason"]) == (
        None,
        "hm",
        "length",
    )
    assert journal.take("a") is None and journal.take("b") is None
    assert Journal(tmp_path / "answers.jsonl").take("c")["content"] == "after"


def test_a_reason_holds_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_API_KEY", "s3cret")
    monkeypatch.setenv("OPENAI_API_KEY", "judges")
    journal = Journal(tmp_path / "answers.jsonl")
    journal.fail("a", "HTTP 401: not s3cret", judge=False)
    journal.fail("j", "HTTP 401: not judges", judge=True)
    assert journal.failures == {"a": "HTTP 401: not ***"}
    assert journal.judge_failures == {"j": "HTTP 401: not ***"}


def test_an_answer_takes_the_failure_before_it_away(tmp_path):
    journal = Journal(tmp_path / "answers.jsonl")
    journal.fail("a", "HTTP 500:\n busy", judge=False)
    journal.fail("j", "HTTP 500", judge=True)
    assert journal.failures == {"a": "HTTP 500: busy"} and set(journal.judge_failures) == {"j"}
    journal.add("a", {"content": "A"}, "stop")
    journal.add("j", {"content": "1.0"}, "stop")
    assert not journal.failures and not journal.judge_failures


def test_a_request_is_known_by_its_words_pictures_and_settings(tmp_path):
    for name, content in (("1.jpg", b"red"), ("2.jpg", b"blue"), ("copy.jpg", b"red")):
        (tmp_path / name).write_bytes(content)

    def key(picture: str, text: str = "What?", *settings, system: bool = False) -> str:
        message = [{"type": "image", "value": str(tmp_path / picture)}]
        message += [{"type": "text", "value": "Be brief.", "role": "system"}] * system
        return key_of([*message, {"type": "text", "value": text}], *settings)

    assert key("1.jpg") == key("copy.jpg") == key("1.jpg", system=True)
    different = {key("1.jpg"), key("2.jpg"), key("1.jpg", "Who?"), key("1.jpg", "What?", 0.6)}
    assert len(different) == 4

"""VLMEvalKit's scores of answers that are known; what is expected is worked out by hand."""

import json
import shutil
from dataclasses import replace

import pytest

from eval.benchmarks import load
from eval.options import Judge
from eval.result import EvalError
from eval.vlmevalkit_figures import read_figures
from tests.eval import tables
from tests.eval.known_endpoint import knowing
from tests.eval.real_vlmevalkit import NEEDED, ask

pytestmark = NEEDED


def test_mmbench_scores_circles(tmp_path):
    tables.mmbench(tmp_path / "data")
    said = {"no. 1?\nOptions:\nA. cat": "A", "no. 1?\nOptions:\nA. dog": "B", "no. 2?": "A"}
    with knowing(said) as server:
        result, samples = ask(server, tmp_path, "mmbench_en")
    assert (result.score, result.n, len(samples)) == (50.0, 2, 4)
    assert [samples["1"].score, samples["2"].score, samples["1000001"].score] == [1, 0, None]


def test_chartqa_relaxed_accuracy(tmp_path):
    human, augmented = {"split": "test_human"}, {"split": "test_augmented"}
    rows = [("3", human), ("3", human), ("yes", human), ("none", augmented), ("2.5", augmented)]
    tables.questions(tmp_path / "data", "ChartQA_TEST", rows)
    # Within 5 % and beyond it; "None" is a word that tables read as nothing; = begins a formula.
    said = {"no. 1?": "2.9", "no. 2?": "3.2", "no. 3?": "Yes", "no. 4?": "None", "no. 5?": "=2.5"}
    with knowing(said) as server:
        result, samples = ask(server, tmp_path, "chartqa")
    assert [samples[str(n)].score for n in range(1, 6)] == [1, 0, 1, 1, 0]
    assert [samples[str(n)].extracted for n in (4, 5)] == ["None", "=2.5"]
    assert result.score == pytest.approx(60)
    assert {name: part["n"] for name, part in result.subsets.items()} == {
        "test_human": 3,
        "test_augmented": 2,
    }


def test_textvqa_numbers_stay_what_was_said(tmp_path):
    three, mixed, half = ["3"] * 10, ["3", "3"] + ["4"] * 8, ["2.5"] * 10
    rows = [(str(gold), {}) for gold in (three, mixed, half)]
    tables.questions(tmp_path / "data", "TextVQA_VAL", rows)
    with knowing({"no. 1?": "3", "no. 2?": "3", "no. 3?": "2.5"}) as server:
        result, samples = ask(server, tmp_path, "textvqa")
    # VQA accuracy: the mean over the ten of min(1, others who say so / 3). For the second: two
    # annotators have one other beside them, eight have two: (2 * 1/3 + 8 * 2/3) / 10.
    assert [samples[n].score for n in "123"] == pytest.approx([1, 0.6, 1])
    assert result.score == pytest.approx(100 * 2.6 / 3)
    assert [samples[n].raw for n in "123"] == ["3", "3", "2.5"]


def test_docvqa_anls(tmp_path):
    rows = [(str(["abcd", "x"]), {}), (str(["abcd"]), {}), (str(["abcd"]), {})]
    tables.questions(tmp_path / "data", "DocVQA_VAL", rows)
    with knowing({"no. 1?": "ABCD", "no. 2?": "abcx", "no. 3?": "axxx"}) as server:
        result, samples = ask(server, tmp_path, "docvqa")
    # 1 - distance / length, and 0 below a half.
    assert [samples[n].score for n in "123"] == pytest.approx([1, 0.75, 0])
    assert result.score == pytest.approx(100 * 1.75 / 3)


def test_pope_f1_and_accuracy(tmp_path):
    kinds = ["adversarial", "popular", "adversarial,random", "random", "popular", "popular"]
    golds = ["Yes", "Yes", "No", "No", "Yes", "No"]
    rows = [(gold, {"category": kind}) for gold, kind in zip(golds, kinds, strict=True)]
    tables.questions(tmp_path / "data", "POPE", rows)
    words = ["Yes.", "no", "Yes", "No", "Perhaps", "No"]
    with knowing({f"no. {n}?": word for n, word in enumerate(words, 1)}) as server:
        result, samples = ask(server, tmp_path, "pope")
    # The third counts once for each of its categories: one true positive, two false positives,
    # two false negatives, so that precision and recall are both 1/3; 1, 4 and 6 of 7 are right.
    assert result.score == pytest.approx(100 / 3)
    outcome = json.loads((tmp_path / "result" / "backend" / "outcome.json").read_text())
    accuracy, _, _ = read_figures(replace(load("pope"), metric="accuracy"), outcome)
    assert accuracy == pytest.approx(100 * 3 / 7)
    assert result.unparsed == 1 / 6 and samples["5"].extracted is None
    assert result.subsets["adversarial"]["n"] == 2 and result.subsets["random"]["n"] == 2


def test_ocrbench_points(tmp_path):
    kinds = ["Regular Text Recognition", "Doc-oriented VQA", "Digit String Recognition"]
    rows = [(str(["Hello"]), {"category": kind}) for kind in kinds]
    tables.questions(tmp_path / "data", "OCRBench", rows)
    with knowing({"no. 1?": "it says hello", "no. 2?": "Hello", "no. 3?": "bye"}) as server:
        benchmark = replace(load("ocrbench"), thinking=False)
        result, samples = ask(server, tmp_path, benchmark)
    assert result.score == pytest.approx(100 * 2 / 3) and result.n == 3
    assert samples["3"].raw == "bye"
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_judge_scores_mmvet_and_one_that_fails_is_no_score(tmp_path):
    rows = [("red", {"category": "rec,ocr,know"}), ("blue", {"category": "gen,spat,math"})]
    tables.questions(tmp_path / "data", "MMVet", rows)
    models = ("fake-vl", "judge")
    judged = {"hello": "hi", "| red | crimson": "0.8", "| blue | azure": "0.3"}
    said = {**judged, "no. 1?": "crimson", "no. 2?": "azure"}
    with knowing(said, models=models) as server:
        judge = Judge(f"{server.url}/v1", "judge")
        result, samples = ask(server, tmp_path, "mmvet", judge=judge)
    assert result.score == pytest.approx(55) and result.protocol["judge"] == "judge"
    assert [samples["1"].score, samples["2"].score] == pytest.approx([0.8, 0.3])
    assert {r["model"] for r in server.requests if "crimson" in json.dumps(r)} == {"judge"}
    shutil.rmtree(tmp_path / "result")
    with knowing({**said, "| blue | azure": 500}, models=models) as server:
        judge = Judge(f"{server.url}/v1", "judge")
        with pytest.raises(EvalError, match=r"the judge gave no answer to .*HTTP 500"):
            ask(server, tmp_path, "mmvet", judge=judge)


def test_a_judge_reads_out_mathvista(tmp_path):
    number = {"question_type": "free_form", "answer_type": "integer", "choices": ""}
    letter = {"question_type": "multi_choice", "answer_type": "text", "answer_option": "B"}
    common = {"task": "figure question answering", "skills": "['counting']"}
    rows = [("3", common | number)] * 3 + [
        ("blue", common | letter | {"choices": str(["red", "blue"])})
    ]
    tables.questions(tmp_path / "data", "MathVista_MINI", rows)
    judged = {"hello": "hi", "respone: It is three": "3", "respone: Some": "7"}
    said = {"no. 1?": "3", "no. 2?": "It is three", "no. 3?": "Some", "no. 4?": "B"}
    with knowing(judged | said, models=("fake-vl", "judge")) as server:
        judge = Judge(f"{server.url}/v1", "judge")
        result, samples = ask(server, tmp_path, "mathvista", judge=judge)
    assert [samples[n].score for n in "1234"] == [1, 1, 0, 1]
    assert [samples[n].extracted for n in "1234"] == ["3", "3", "7", "B"]
    assert result.score == pytest.approx(75)

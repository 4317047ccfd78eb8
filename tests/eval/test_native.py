"""EvalScope's native backend against a server whose answers are known.

The scores expected here are worked out by hand.
"""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from eval import native
from eval.benchmarks import Benchmark, load
from eval.options import Judge, Options
from eval.result import EvalError, Result, SampleResult
from tests.eval import families
from tests.eval.known_endpoint import KnownHandler, knowing

MMMU = replace(load("mmmu"), subsets=["Art", "Math"])
MMMU_ANSWERS = {
    "no. 1?": "ANSWER: A",
    "no. 2?": "It is red.\nANSWER: C",  # wrong
    "no. 3?": "<think>ANSWER: A?</think>\n\nANSWER: C",
    "no. 4?": "I do not know",  # unparsable
    "no. 5?": {"content": "Let me think", "finish_reason": "length"},
    "no. 6?": "**Answer: (B)**",
    "no. 7?": "ANSWER: C, not B",
    "no. 8?": "ANSWER: 42",
    "no. 9?": "that is,\u2028ANSWER: 0.5",  # what some readers take for the end of a line
}
"""Right: 1 and 3 of four in Art; 6, 7, 8 and 9 of five in Math."""
ROUNDED = 0.005
"""The library gives percentages with two decimals."""


def ask(
    server, root: Path, benchmark: Benchmark, **changes
) -> tuple[Result, dict[int, SampleResult]]:
    """A result, and its samples by number."""
    options = Options(
        api_base=f"{server.url}/v1",
        model="fake-vl",
        checkpoint="mine",
        folder=root / "result",
        data_root=root / "data",
        retries=0,
    )
    result, samples = native.run(benchmark, replace(options, **changes))
    return result, {no_of(sample.question): sample for sample in samples}


def no_of(request: object) -> int:
    text = request if isinstance(request, str) else json.dumps(request)
    return int(re.search(r"no\. (\d+)\?", text)[1])


def numbers(server) -> list[int]:
    return sorted(map(no_of, server.requests))


@pytest.fixture(scope="module")
def mmmu_data(tmp_path_factory) -> Path:
    """The data root; nothing is written to it."""
    root = tmp_path_factory.mktemp("data")
    families.mmmu(root)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mmmu_data):
    """MMMU, uninterrupted: (result, samples, the requests)."""
    with knowing(MMMU_ANSWERS) as server:
        result, samples = ask(server, tmp_path_factory.mktemp("whole"), MMMU, data_root=mmmu_data)
    return result, samples, server.requests


def same(one: Result, other: Result) -> bool:
    return replace(one, seconds=0) == replace(other, seconds=0)


def test_mmmu_right_wrong_unparsable_truncated_and_with_thoughts(whole):
    result, samples, requests = whole
    assert result.complete and result.n == 9
    assert result.score == pytest.approx(100 * 6 / 9, abs=ROUNDED)
    assert result.subsets == {"Art": {"score": 50.0, "n": 4}, "Math": {"score": 80.0, "n": 5}}
    assert {n for n, sample in samples.items() if sample.score == 1} == {1, 3, 6, 7, 8, 9}
    assert (result.unparsed, result.truncated) == (2 / 9, 1 / 9)
    assert samples[3].raw == "<think>\nANSWER: A?\n</think>\n\nANSWER: C"
    assert samples[3].extracted == "C" and samples[4].extracted is None
    assert samples[5].truncated and samples[5].error is None
    assert samples[9].raw == MMMU_ANSWERS["no. 9?"] and samples[9].gold == "['1/2', '0.5']"
    assert result.backend == "native" and result.backend_version == "evalscope 1.14.1"
    assert len(requests) == 9


def test_mmmu_what_is_sent_and_what_is_recorded_of_it(whole):
    result, samples, requests = whole
    request = next(request for request in requests if no_of(request) == 2)
    assert (request["temperature"], request["max_tokens"]) == (0.0, 2048)
    kinds = [part["type"] for part in request["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "text"]
    assert request["messages"][0]["content"][1]["image_url"]["url"] == samples[2].images[0]
    assert base64.b64decode(samples[2].images[0].partition(",")[2]) == families.png(2 * 37)
    assert "What is no. 2?\n\nA) red\nB) green" in samples[2].question
    assert result.protocol["subsets"] == ["Art", "Math"] and result.protocol["limit"] is None


def test_thinking_is_switched_where_a_benchmark_says_so(tmp_path, mmmu_data):
    thinking = replace(MMMU, thinking=True, differs="it thinks")
    with knowing(MMMU_ANSWERS) as server:
        result, _ = ask(server, tmp_path, thinking, data_root=mmmu_data, limit=1)
    assert {r["chat_template_kwargs"]["enable_thinking"] for r in server.requests} == {True}
    assert numbers(server) == [1, 5]  # a limit is one of each subset
    assert result.n == 2 and result.protocol["limit"] == 1 and result.notes == ["it thinks"]


def test_the_librarys_own_run_gives_the_same_score(whole, tmp_path, mmmu_data):
    from evalscope import TaskConfig, run_task

    with knowing(MMMU_ANSWERS) as server:
        config = TaskConfig(
            model="fake-vl",
            model_id="mine",
            api_url=f"{server.url}/v1",
            api_key="EMPTY",
            eval_type="openai_api",
            datasets=["mmmu"],
            dataset_args={
                "mmmu": {"local_path": str(mmmu_data / "mmmu"), "subset_list": ["Art", "Math"]}
            },
            generation_config={
                "temperature": 0.0,
                "max_tokens": 2048,
                "retries": 1,
                "timeout": 60,
                "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
            },
            eval_batch_size=64,
            work_dir=str(tmp_path),
            no_timestamp=True,
        )
        report = run_task(config)["mmmu"]
    result, _, requests = whole
    assert 100 * report.score == pytest.approx(result.score)
    ours = {no_of(request): request["messages"] for request in requests}
    assert {no_of(request): request["messages"] for request in server.requests} == ours


class TooLong(KnownHandler):
    """Says 413 as vLLM does: a 400 whose text the library would take for an answer."""

    said = "This model's maximum context length is 4096 tokens"

    def _error(self, status: int, message: str) -> None:
        super()._error(*((400, self.said) if status == 413 else (status, message)))


def test_what_failed_gives_no_score_and_only_that_is_asked_again(whole, tmp_path, mmmu_data):
    failing = {**MMMU_ANSWERS, "no. 2?": 500, "no. 4?": 400, "no. 6?": 413}
    with knowing(failing) as server:
        server.RequestHandlerClass = TooLong
        result, samples = ask(server, tmp_path, MMMU, data_root=mmmu_data, retries=1)
    assert numbers(server) == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9]  # a 500 may pass, a 400 does not
    assert not result.complete and result.score is None and result.subsets == {}
    assert (result.n, result.errored, result.missing) == (9, 3, 0)
    assert {n for n, sample in samples.items() if sample.error} == {2, 4, 6}
    assert "500" in samples[2].error and "400" in samples[4].error
    assert TooLong.said in samples[6].error
    assert samples[6].score is None and samples[6].raw == ""
    with knowing(MMMU_ANSWERS) as server:  # at another address
        result, samples = ask(server, tmp_path, MMMU, data_root=mmmu_data, resume=True)
    assert numbers(server) == [2, 4, 6]
    assert same(result, whole[0]) and samples == whole[1]


def test_a_server_that_dies_in_the_middle_and_comes_back(whole, tmp_path, mmmu_data):
    with knowing(MMMU_ANSWERS, breaks_after=4) as server:
        result, samples = ask(server, tmp_path, MMMU, data_root=mmmu_data, concurrency=1)
    assert result.errored == 5 and result.score is None
    assert "onnection" in samples[9].error
    with knowing(MMMU_ANSWERS) as server:
        result, samples = ask(server, tmp_path, MMMU, data_root=mmmu_data, resume=True)
    assert numbers(server) == [5, 6, 7, 8, 9]
    assert same(result, whole[0]) and samples == whole[1]


def test_a_dead_server_is_no_score_of_zero(tmp_path, mmmu_data):
    with knowing(MMMU_ANSWERS) as server:
        pass
    result, samples = ask(server, tmp_path, MMMU, data_root=mmmu_data)
    assert (result.score, result.errored, result.n) == (None, 9, 9)
    assert "onnection" in samples[1].error


def test_an_answer_that_takes_too_long_is_an_error(tmp_path):
    families.general_vmcq(tmp_path / "data", "AB")
    with knowing({"no. 1?": "ANSWER: A", "no. 2?": "ANSWER: B"}, holds_after=1) as server:
        result, samples = ask(server, tmp_path, own_choices(), concurrency=1, timeout=5)
    assert (result.score, result.errored) == (None, 1)
    assert samples[1].score == 1 and "timed out" in samples[2].error


@pytest.mark.parametrize("cut", [1, 40, 2000])
def test_half_a_line_is_asked_again(cut, whole, tmp_path, mmmu_data):
    """What a process that is killed while it writes leaves behind."""
    with knowing(MMMU_ANSWERS) as server:
        ask(server, tmp_path, MMMU, data_root=mmmu_data, concurrency=1)
    for path in (tmp_path / "result" / "backend" / "predictions").rglob("*_Math.jsonl"):
        last = no_of(path.read_text().rstrip("\n").split("\n")[-1])
        path.write_bytes(path.read_bytes()[:-cut])
    with knowing(MMMU_ANSWERS) as server:
        result, samples = ask(server, tmp_path, MMMU, data_root=mmmu_data, resume=True)
    assert numbers(server) == [last]
    assert same(result, whole[0]) and samples == whole[1]


def test_other_data_under_the_same_name_is_refused(tmp_path):
    families.general_vmcq(tmp_path / "data", "AB")
    said = {"no. 1?": "ANSWER: A", "no. 2?": 500}
    with knowing(said) as server:
        ask(server, tmp_path, own_choices())
        (tmp_path / "data" / "general_vmcq" / "1.png").write_bytes(families.png(250))
        with pytest.raises(EvalError, match="is not what this run was begun with"):
            ask(server, tmp_path, own_choices(), resume=True)
    assert len(server.requests) == 2


def own_choices(**changes) -> Benchmark:
    about = {"name": "own", "title": "Own", "source": "none", "licence": "none", "size": None}
    settings = {"metric": "accuracy", "native": "general_vmcq", "subsets": ["mine"]}
    return Benchmark(**about | settings | changes)


def test_general_vmcq_with_a_prompt_of_ones_own(tmp_path):
    families.general_vmcq(tmp_path / "data", "ABC")
    said = {"no. 1?": "A", "no. 2?": "green, so B.", "no. 3?": "ANSWER: D"}
    with knowing(said) as server:
        result, samples = ask(server, tmp_path, own_choices(prompt="{question}\n{choices}"))
    assert [samples[n].score for n in (1, 2, 3)] == [1, 1, 0]
    assert result.score == pytest.approx(100 * 2 / 3, abs=ROUNDED)
    picture, text = server.requests[0]["messages"][0]["content"]
    assert picture["type"] == "image_url"
    assert re.fullmatch(r" What is no. \d\?\nA\) red\nB\) green\nC\) blue\nD\) black", text["text"])
    assert samples[1].images == (str(tmp_path / "data" / "general_vmcq" / "1.png"),)


def test_chartqa_relaxed_accuracy(tmp_path):
    human, augmented = "human_test", "augmented_test"
    rows = [(human, "3"), (human, "3"), (human, "Yes"), (human, "12%")]
    families.chartqa(tmp_path / "data", [*rows, (augmented, "2.5"), (augmented, "blue")])
    said = {
        "no. 1?": "ANSWER: 2.9",  # within 5 %
        "no. 2?": "ANSWER: 3.2",  # beyond it
        "no. 3?": "ANSWER: yes",
        "no. 4?": "12%",  # right, but not in the form that was asked for
        "no. 5?": "ANSWER: **2.5**",
        "no. 6?": {"content": "The colour", "finish_reason": "length"},
    }
    with knowing(said) as server:
        result, samples = ask(server, tmp_path, load("chartqa"))
    assert [samples[n].score for n in range(1, 7)] == [1, 0, 1, 0, 1, 0]
    assert result.score == pytest.approx(50)
    assert result.subsets == {human: {"score": 50, "n": 4}, augmented: {"score": 50, "n": 2}}
    assert (result.unparsed, result.truncated) == (2 / 6, 1 / 6)


def test_docvqa_half_right(tmp_path):
    families.docvqa(tmp_path / "data", [["abcd", "x"], ["abcd"], ["abcd"], ["red"], ["red"]])
    said = {
        "no. 1?": "ANSWER: ABCD",
        "no. 2?": "ANSWER: abcx",  # 1 - 1 / 4
        "no. 3?": "ANSWER: axxx",  # below a half
        "no. 4?": "<think>blue?</think>\n\nred",
        "no. 5?": "blue?\n</think>\n\nRed",  # where the template has opened the thought
    }
    with knowing(said) as server:
        result, samples = ask(server, tmp_path, load("docvqa"))
    assert [samples[n].score for n in range(1, 6)] == pytest.approx([1, 0.75, 0, 1, 1])
    assert result.score == pytest.approx(75)
    assert samples[1].gold == '["abcd", "x"]' and samples[5].raw == said["no. 5?"]


def test_pope_f1_and_accuracy(tmp_path):
    rows = [("popular", "yes"), ("popular", "yes"), ("adversarial", "no"), ("adversarial", "no")]
    families.pope(tmp_path / "data", [*rows, ("random", "yes"), ("random", "no")])
    said = {"no. 1?": "Yes.", "no. 2?": "no", "no. 3?": "Yes", "no. 4?": "No"}
    said |= {"no. 5?": "Perhaps", "no. 6?": "Yes or No"}
    with knowing(said) as server:
        result, samples = ask(server, tmp_path, load("pope"))
        accuracy, _ = ask(
            server, tmp_path, replace(load("pope"), native_metric="accuracy"), resume=True
        )
    # Popular: precision 1, recall 1/2. The others have no true positive. The mean of the splits.
    assert result.score == pytest.approx(100 * (2 / 3) / 3, abs=ROUNDED)
    assert result.subsets["popular"] == {"score": pytest.approx(200 / 3, abs=ROUNDED), "n": 2}
    assert [samples[n].extracted for n in range(1, 7)] == ["YES", "NO", "YES", "NO", None, None]
    assert result.unparsed == 2 / 6
    assert accuracy.score == pytest.approx(100 * 2 / 6, abs=ROUNDED)
    assert len(server.requests) == 6


def test_hallusion_bench_per_question(tmp_path):
    families.hallusion_bench(tmp_path / "data", [("1", "yes"), ("1", "no"), ("2", "no")])
    with knowing({"no. 1?": "Yes", "no. 2?": "NO", "no. 3?": "It is. Yes"}) as server:
        result, samples = ask(server, tmp_path, load("hallusionbench"))
    assert [samples[n].score for n in (1, 2, 3)] == [1, 1, 0]
    assert result.score == pytest.approx(100 * 2 / 3, abs=ROUNDED)


def test_mvbench_sends_the_videos(tmp_path, monkeypatch):
    from evalscope.benchmarks.mvbench.mvbench_adapter import MVBenchAdapter

    monkeypatch.setattr(MVBenchAdapter, "video_cache_dir", str(tmp_path / "videos"))
    families.mvbench(tmp_path / "data", ["red", "green", "blue"])
    said = {"no. 1?": "ANSWER: A", "no. 2?": "ANSWER: C", "no. 3?": "ANSWER: C"}
    with knowing(said) as server:
        result, samples = ask(
            server, tmp_path, replace(load("mvbench"), subsets=["action_antonym"])
        )
    assert [samples[n].score for n in (1, 2, 3)] == [1, 0, 1]
    assert result.score == pytest.approx(100 * 2 / 3, abs=ROUNDED)
    for request in server.requests:
        (sent,) = (p for p in request["messages"][0]["content"] if p["type"] == "video_url")
        kept = tmp_path / "videos" / "action_antonym" / f"{no_of(request)}.mp4"
        assert base64.b64decode(sent["video_url"]["url"].partition(",")[2]) == kept.read_bytes()


VERDICTS = {
    "[Predicted Answer]\nIt is three": '{"reasoning": "so", "verdict": "A"}',
    "[Predicted Answer]\nANSWER: 5": '{"reasoning": "no", "verdict": "B"}',
}


def test_a_judge_scores_and_what_it_fails_on_is_no_score(tmp_path):
    families.mathvista(tmp_path / "data", ["3", "4"])
    said = {**VERDICTS, "no. 1?": "It is three", "no. 2?": "ANSWER: 5"}
    failing = {**said, "[Predicted Answer]\nANSWER: 5": "Well."}
    with knowing(said) as server:
        by_rules, _ = ask(server, tmp_path, load("mathvista"))
    assert (by_rules.score, by_rules.protocol["judge"]) == (0, None)
    folder = tmp_path / "judged"
    models = ("fake-vl", "judge")
    with knowing(failing, models=models) as server:
        judge = Judge(f"{server.url}/v1", "judge")
        result, samples = ask(server, tmp_path, load("mathvista"), judge=judge, folder=folder)
    assert (result.score, result.errored) == (None, 1)  # the library would fall back on its rules
    assert samples[1].score == 1 and samples[2].score is None
    assert "no judge produced a usable verdict" in samples[2].error
    assert samples[2].raw == "ANSWER: 5"
    with knowing(said, models=models) as server:
        judge = Judge(f"{server.url}/v1", "judge")
        result, samples = ask(
            server, tmp_path, load("mathvista"), judge=judge, folder=folder, resume=True
        )
    assert result.score == 50 and result.protocol["judge"] == "judge"
    assert {request["model"] for request in server.requests} == {"judge"}


def test_data_that_is_not_there_or_not_in_its_layout(tmp_path):
    (tmp_path / "data").mkdir()
    with knowing({}) as server:
        with pytest.raises(EvalError, match=r"has no data of chartqa \(looked for chartqa, lmms-"):
            ask(server, tmp_path, load("chartqa"))
        with pytest.raises(EvalError, match="custom has no data of its own; name a file with"):
            ask(server, tmp_path, load("custom"), data_root=None)
        (tmp_path / "data" / "chartqa").mkdir()
        with pytest.raises(EvalError, match="EvalScope could not run chartqa: "):
            ask(server, tmp_path, load("chartqa"))
    assert server.requests == []


def test_no_file_holds_the_key(tmp_path):
    families.general_vmcq(tmp_path / "data", "A")
    with knowing({"no. 1?": "ANSWER: A"}) as server:
        result, samples = ask(server, tmp_path, own_choices(), api_key="s3cret-key")
    assert result.errored == 1 and "401" in samples[1].error
    for path in (tmp_path / "result").rglob("*"):
        assert not path.is_file() or b"s3cret-key" not in path.read_bytes(), path

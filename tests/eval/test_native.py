"""EvalScope's native backend against a server whose answers are known.

The scores expected here are worked out by hand.
"""

import base64
import re
import zipfile
from dataclasses import replace

import pytest

from eval.benchmarks import load
from tests.eval import families
from tests.eval.known_endpoint import knowing
from tests.eval.native_runs import (
    MMMU,
    MMMU_ANSWERS,
    ROUNDED,
    Whole,
    ask,
    no_of,
    numbers,
    own_choices,
    whole_mmmu,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return whole_mmmu(tmp_path_factory.mktemp("whole"))


def test_mmmu_right_wrong_unparsable_truncated_and_with_thoughts(whole):
    result, samples, requests = whole.result, whole.samples, whole.requests
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
    result, samples, requests = whole.result, whole.samples, whole.requests
    request = next(request for request in requests if no_of(request) == 2)
    assert (request["temperature"], request["max_tokens"]) == (0.0, 2048)
    kinds = [part["type"] for part in request["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "text"]
    assert request["messages"][0]["content"][1]["image_url"]["url"] == samples[2].images[0]
    assert base64.b64decode(samples[2].images[0].partition(",")[2]) == families.png(2 * 37)
    assert "What is no. 2?\n\nA) red\nB) green" in samples[2].question
    assert result.protocol["subsets"] == ["Art", "Math"] and result.protocol["limit"] is None


def test_thinking_is_switched_where_a_benchmark_says_so(tmp_path, whole):
    thinking = replace(MMMU, thinking=True, differs="it thinks")
    with knowing(MMMU_ANSWERS) as server:
        result, _ = ask(server, tmp_path, thinking, data_root=whole.data_root, limit=1)
    assert {r["chat_template_kwargs"]["enable_thinking"] for r in server.requests} == {True}
    assert numbers(server) == [1, 5]  # a limit is one of each subset
    assert result.n == 2 and result.protocol["limit"] == 1 and result.notes == ["it thinks"]


def test_the_librarys_own_run_gives_the_same_score(whole, tmp_path, monkeypatch):
    import datasets
    from evalscope import TaskConfig, run_task

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with knowing(MMMU_ANSWERS) as server:
        config = TaskConfig(
            model="fake-vl",
            model_id="mine",
            api_url=f"{server.url}/v1",
            api_key="EMPTY",
            eval_type="openai_api",
            datasets=["mmmu"],
            dataset_args={
                "mmmu": {
                    "local_path": str(whole.data_root / "mmmu"),
                    "subset_list": ["Art", "Math"],
                }
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
    result, requests = whole.result, whole.requests
    assert 100 * report.score == pytest.approx(result.score)
    ours = {no_of(request): request["messages"] for request in requests}
    assert {no_of(request): request["messages"] for request in server.requests} == ours


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


def test_mvbench_sends_the_videos(tmp_path):
    folder = families.mvbench(tmp_path / "data", ["red", "green", "blue"])
    said = {"no. 1?": "ANSWER: A", "no. 2?": "ANSWER: C", "no. 3?": "ANSWER: C"}
    with knowing(said) as server:
        result, samples = ask(
            server, tmp_path, replace(load("mvbench"), subsets=["action_antonym"])
        )
    assert [samples[n].score for n in (1, 2, 3)] == [1, 0, 1]
    assert result.score == pytest.approx(100 * 2 / 3, abs=ROUNDED)
    archive = zipfile.ZipFile(folder / "video" / "ssv2_video.zip")
    for request in server.requests:
        (sent,) = (p for p in request["messages"][0]["content"] if p["type"] == "video_url")
        video = base64.b64decode(sent["video_url"]["url"].partition(",")[2])
        assert video == archive.read(f"ssv2_video/{no_of(request)}.mp4")
    assert not (tmp_path / "result" / "backend" / "cache").exists()

"""The native backend where answers fail, servers die and runs go on: no score without evidence."""

import pytest

from eval.benchmarks import load
from eval.options import Judge
from eval.result import EvalError
from tests.eval import families
from tests.eval.known_endpoint import KnownHandler, knowing
from tests.eval.native_runs import (
    MMMU,
    MMMU_ANSWERS,
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


class TooLong(KnownHandler):
    """Says 413 as vLLM does: a 400 whose text the library would take for an answer."""

    said = "This model's maximum context length is 4096 tokens"

    def _error(self, status: int, message: str) -> None:
        super()._error(*((400, self.said) if status == 413 else (status, message)))


def test_what_failed_gives_no_score_and_only_that_is_asked_again(whole, tmp_path):
    failing = {**MMMU_ANSWERS, "no. 2?": 500, "no. 4?": 400, "no. 6?": 413}
    with knowing(failing) as server:
        server.RequestHandlerClass = TooLong
        result, samples = ask(server, tmp_path, MMMU, data_root=whole.data_root, retries=1)
    assert numbers(server) == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9]  # a 500 may pass, a 400 does not
    assert not result.complete and result.score is None and result.subsets == {}
    assert (result.n, result.errored, result.missing) == (9, 3, 0)
    assert {n for n, sample in samples.items() if sample.error} == {2, 4, 6}
    assert "500" in samples[2].error and "400" in samples[4].error
    assert TooLong.said in samples[6].error
    assert samples[6].score is None and samples[6].raw == ""
    with knowing(MMMU_ANSWERS) as server:  # at another address
        result, samples = ask(server, tmp_path, MMMU, data_root=whole.data_root, resume=True)
    assert numbers(server) == [2, 4, 6]
    assert whole.is_what_came(result, samples)


def test_a_server_that_dies_in_the_middle_and_comes_back(whole, tmp_path):
    with knowing(MMMU_ANSWERS, breaks_after=4) as server:
        result, samples = ask(server, tmp_path, MMMU, data_root=whole.data_root, concurrency=1)
    assert result.errored == 5 and result.score is None
    assert "onnection" in samples[9].error
    with knowing(MMMU_ANSWERS) as server:
        result, samples = ask(server, tmp_path, MMMU, data_root=whole.data_root, resume=True)
    assert numbers(server) == [5, 6, 7, 8, 9]
    assert whole.is_what_came(result, samples)


def test_a_dead_server_is_no_score_of_zero(tmp_path, whole):
    with knowing(MMMU_ANSWERS) as server:
        pass
    result, samples = ask(server, tmp_path, MMMU, data_root=whole.data_root)
    assert (result.score, result.errored, result.n) == (None, 9, 9)
    assert "onnection" in samples[1].error


def test_an_answer_that_takes_too_long_is_an_error(tmp_path):
    families.general_vmcq(tmp_path / "data", "AB")
    with knowing({"no. 1?": "ANSWER: A", "no. 2?": "ANSWER: B"}, holds_after=1) as server:
        result, samples = ask(server, tmp_path, own_choices(), concurrency=1, timeout=5)
    assert (result.score, result.errored) == (None, 1)
    assert samples[1].score == 1 and "timed out" in samples[2].error


@pytest.mark.parametrize("cut", [1, 40, 2000])
def test_half_a_line_is_asked_again(cut, whole, tmp_path):
    """What a process that is killed while it writes leaves behind."""
    with knowing(MMMU_ANSWERS) as server:
        ask(server, tmp_path, MMMU, data_root=whole.data_root, concurrency=1)
    for path in (tmp_path / "result" / "backend" / "predictions").rglob("*_Math.jsonl"):
        last = no_of(path.read_text().rstrip("\n").split("\n")[-1])
        path.write_bytes(path.read_bytes()[:-cut])
    with knowing(MMMU_ANSWERS) as server:
        result, samples = ask(server, tmp_path, MMMU, data_root=whole.data_root, resume=True)
    assert numbers(server) == [last]
    assert whole.is_what_came(result, samples)


def test_other_data_under_the_same_name_is_refused(tmp_path):
    families.general_vmcq(tmp_path / "data", "AB")
    said = {"no. 1?": "ANSWER: A", "no. 2?": 500}
    with knowing(said) as server:
        ask(server, tmp_path, own_choices())
        (tmp_path / "data" / "general_vmcq" / "1.png").write_bytes(families.png(250))
        with pytest.raises(EvalError, match="is not what this run was begun with"):
            ask(server, tmp_path, own_choices(), resume=True)
    assert len(server.requests) == 2


def test_data_that_was_completed_is_read_anew(tmp_path):
    families.docvqa(tmp_path / "data", [["red"]])
    with knowing({"no. 1?": "red", "no. 2?": "red"}) as server:
        result, _ = ask(server, tmp_path, load("docvqa"))
        assert result.n == 1
        families.docvqa(tmp_path / "data", [["red"], ["red"]])
        result, _ = ask(server, tmp_path, load("docvqa"), folder=tmp_path / "other")
    assert result.n == 2


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

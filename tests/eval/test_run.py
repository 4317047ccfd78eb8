"""The command: what it refuses, what it prints and writes, and how it goes on after a failure.

The scores expected here are worked out by hand.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eval import vlmevalkit
from eval.result import read_result
from eval.run import main
from tests.eval import families
from tests.eval.known_endpoint import knowing
from tests.eval.native_runs import numbers

ROOT = Path(__file__).parents[2]
ROWS = [(f"What is no. {number}?", gold) for number, gold in enumerate("abcd", 1)]
ANSWERS = {
    "no. 1?": "a",
    "no. 2?": {"content": "I think that", "finish_reason": "length"},
    "no. 3?": "ANSWER: c",
    "no. 4?": "d",
}
LINE = "custom (native): exact match 75.00 (n 4, unparsed 0.0%, truncated 25.0%)\n"


@pytest.fixture
def data(tmp_path) -> Path:
    return families.own(tmp_path / "data" / "held_out.jsonl", ROWS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    """`evidence` of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    file = families.own(folder / "data" / "held_out.jsonl", ROWS)
    with knowing(ANSWERS) as server:
        assert run(server, folder, "custom", "--data_root", file) == 0
    return evidence(folder)


def arguments(server, folder: Path, *further: object) -> list[str]:
    flags = ["--api_base", server.url, "--model", "fake-vl", "--checkpoint", "mine"]
    return [str(word) for word in (*further, *flags, "--results", folder / "results")]


def run(server, folder: Path, *further: object) -> int:
    return main(arguments(server, folder, *further))


def evidence(folder: Path, benchmark: str = "custom") -> dict:
    """What a result says, but for the time that it took."""
    place = folder / "results" / "mine" / benchmark
    content = json.loads((place / "result.json").read_text())
    del content["seconds"]
    return {"result": content, "samples": (place / "samples.jsonl").read_text()}


def errors(capsys) -> list[str]:
    """What a run said about its failures; the progress bar is left out."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_a_whole_run_is_one_line_and_is_not_asked_again(data, tmp_path, capsys, whole):
    with knowing(ANSWERS) as server:
        assert run(server, tmp_path, "custom", "--data_root", data) == 0
        assert capsys.readouterr().out == LINE
        assert numbers(server) == [1, 2, 3, 4]
        assert run(server, tmp_path, "custom", "--data_root", data) == 2
        (error,) = errors(capsys)
        assert "custom: " in error and "exists; give --resume to go on with it" in error
        assert run(server, tmp_path, "custom", "--data_root", data, "--resume") == 0
        assert capsys.readouterr().out == LINE
        assert len(server.requests) == 4
    assert evidence(tmp_path) == whole
    result, samples = read_result(tmp_path / "results" / "mine" / "custom")
    assert result.complete and result.model == "fake-vl" and result.checkpoint == "mine"
    assert [sample.truncated for sample in samples] == [False, True, False, False]


def test_what_failed_is_named_and_asked_again(data, tmp_path, capsys, whole):
    given = ("custom", "--data_root", data, "--concurrency", 1)
    with knowing({**ANSWERS, "no. 1?": 400, "no. 3?": 400}) as server:
        assert run(server, tmp_path, *given) == 1
    (error,) = errors(capsys)
    assert "no score, 2 of 4 samples have no answer; the first: Error code: 400" in error
    assert "with --resume" in error
    result, samples = read_result(tmp_path / "results" / "mine" / "custom")
    assert (result.complete, result.score, result.errored) == (False, None, 2)
    assert [bool(sample.error) for sample in samples] == [True, False, True, False]
    assert [sample.score for sample in samples] == [None, 0, None, 1]
    with knowing({**ANSWERS, "no. 1?": 400}) as server:
        assert run(server, tmp_path, *given, "--resume") == 1
        assert numbers(server) == [1, 3]
    with knowing(ANSWERS) as server:
        assert run(server, tmp_path, *given, "--resume") == 0
        assert numbers(server) == [1]
    assert capsys.readouterr().out == LINE
    assert evidence(tmp_path) == whole


def mine(folder: Path, **changes: object) -> Path:
    """`configs/eval/custom.yaml` under the name `mine`, changed; each in a folder of its own."""
    content = yaml.safe_load((ROOT / "configs" / "eval" / "custom.yaml").read_text())
    path = folder / "_".join(["yaml", *changes]) / "mine.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content | {"name": "mine"} | changes))
    return path


def test_a_run_is_resumed_only_with_the_same_settings(data, tmp_path, capsys):
    other = shutil.copyfile(data, data.with_name("other.jsonl"))
    plain = mine(tmp_path)
    with knowing({**ANSWERS, "no. 3?": 400}, models=("fake-vl", "other-vl")) as server:
        assert run(server, tmp_path, plain, "--data_root", data) == 1
        asked = len(server.requests)
        errors(capsys)
        for changed, words in (
            ((plain, "--data_root", other), f"data_root '{data}', not '{other}'"),
            ((plain, "--data_root", data, "--limit", 2), "limit None, not 2"),
            ((mine(tmp_path, max_tokens=9), "--data_root", data), "max_tokens 512, not 9"),
            (
                (mine(tmp_path, temperature=0.5, differs="x"), "--data_root", data),
                "temperature 0.0, not 0.5",
            ),
            ((mine(tmp_path, native_metric="anls"), "--data_root", data), "native_metric None"),
        ):
            assert run(server, tmp_path, *changed, "--resume") == 2
            (error,) = errors(capsys)
            assert f"was begun with {words}" in error and "choose other --results" in error
        words = arguments(server, tmp_path, plain, "--data_root", data, "--resume")
        words[words.index("fake-vl")] = "other-vl"
        assert main(words) == 2
        assert "was begun with model 'fake-vl', not 'other-vl'" in errors(capsys)[0]
        data.write_text(data.read_text().replace("no. 4?", "number 4?"))
        assert run(server, tmp_path, plain, "--data_root", data, "--resume") == 2
        assert "is not what this run was begun with" in errors(capsys)[0]
        assert len(server.requests) == asked


def test_a_limit_is_part_of_the_protocol(data, tmp_path):
    with knowing(ANSWERS) as server:
        assert run(server, tmp_path, "custom", "--data_root", data, "--limit", 1) == 0
        assert numbers(server) == [1]
    said = evidence(tmp_path)["result"]
    assert (said["n"], said["protocol"]["limit"]) == (1, 1)


def test_what_is_known_to_go_wrong_blocks_no_later_run(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vlmevalkit, "PYTHON", tmp_path / "none")
    with knowing({}) as dead:
        pass
    with knowing(ANSWERS) as server:
        given = ("custom", "--data_root", data)
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        bad = data.with_name("bad.jsonl")
        bad.write_text(data.read_text() + '{"messages": []}\n')
        unlisted = arguments(server, tmp_path, *given)
        unlisted[unlisted.index("fake-vl")] = "no-vl"
        for words, said in (
            (arguments(dead, tmp_path, *given), "cannot be asked"),
            (unlisted, f"{server.url}/v1 has no model no-vl; it has fake-vl"),
            (arguments(server, tmp_path, "custom", "--data_root", "gone"), "gone does not exist"),
            (arguments(server, tmp_path, "custom"), "name a file with --data_root"),
            (arguments(server, tmp_path, "custom", "--data_root", empty), "has no samples"),
            (arguments(server, tmp_path, "custom", "--data_root", bad), "bad.jsonl:5: messages is"),
            (arguments(server, tmp_path, "chartqa", "--data_root", tmp_path), "no data of chartqa"),
            (arguments(server, tmp_path, *given, "--backend", "vlmevalkit"), "no vlmevalkit adap"),
            (arguments(server, tmp_path, "mmvet"), "is scored by a judge; name one with --judge"),
            (
                arguments(server, tmp_path, "mmvet", "--judge", f"{server.url},no-judge"),
                "has no model no-judge",
            ),
            (
                arguments(server, tmp_path, "mmvet", "--judge", f"{server.url},fake-vl"),
                "make eval_vlmevalkit",
            ),
            (arguments(server, tmp_path, "chart_qa"), "did you mean chartqa?"),
            (arguments(server, tmp_path, "--suite", "gone.yaml"), "there is no suite gone.yaml"),
        ):
            assert main(words) == 2, words
            (error,) = errors(capsys)
            assert said in error
            assert not list((tmp_path / "results").rglob("result.json"))
        assert server.requests == []
        assert run(server, tmp_path, *given) == 0


def test_keys_come_from_the_environment(data, tmp_path, capsys, monkeypatch):
    """And each endpoint gets its own."""
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with knowing(ANSWERS) as server:
        assert run(server, tmp_path, "custom", "--data_root", data) == 2
        assert "answers 401" in errors(capsys)[0]
        monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
        monkeypatch.setenv("JUDGE_API_KEY", "wrong too")
        words = arguments(server, tmp_path, "mmvet", "--judge", f"{server.url},fake-vl")
        assert main(words) == 2
        assert "answers 401" in errors(capsys)[0]


def test_a_complete_result_is_not_resumed_on_other_data(data, tmp_path, capsys):
    with knowing(ANSWERS) as server:
        assert run(server, tmp_path, "custom", "--data_root", data) == 0
        families.own(data, [(question, "z") for question, _ in ROWS])
        assert run(server, tmp_path, "custom", "--data_root", data, "--resume") == 2
        assert "is not what this run was begun with" in errors(capsys)[0]


@pytest.mark.parametrize("name", ["..", ".", "a\nb", "x" * 300])
def test_a_checkpoint_that_is_no_folder(name, data, tmp_path, capsys):
    with knowing(ANSWERS) as server:
        words = arguments(server, tmp_path, "custom", "--data_root", data)
        words[words.index("mine")] = name
        assert main(words) == 2
        assert "choose another --checkpoint" in errors(capsys)[0]
        assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:80a", "http://a b", "http://[::1"])
def test_a_url_that_is_none(url, data, tmp_path, capsys):
    flags = ["--api_base", url, "--model", "m", "--results", str(tmp_path / "r")]
    assert main(["custom", "--data_root", str(data), *flags]) == 2
    assert "cannot be asked" in errors(capsys)[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name benchmarks, or a --suite"),
        (["pope", "pope"], "named twice"),
        (["pope", "--api_base", "http://x", "--model", "m", "--limit", "0"], "--limit is 0"),
        (["pope", "--api_base", "http://x", "--model", "m", "--concurrency", "0"], "must be 1"),
        (["pope", "--serve", "x", "--model", "m"], "--model goes with --api_base"),
        (["pope", "--suite", "x"], "name benchmarks, or a --suite"),
        (["pope"], "give --api_base, or an export to --serve"),
        (["pope", "--api_base", "http://x"], "--api_base needs --model"),
        (["mmvet", "--judge", "gpt"], "'gpt' is not URL,MODEL"),
    ],
)
def test_a_command_line_that_lacks_something(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_suite_goes_on_after_a_failure(tmp_path, capsys):
    root = tmp_path / "data"
    families.docvqa(root, [["red"], ["red"]])
    families.pope(root, [("popular", "yes"), ("adversarial", "no"), ("random", "no")])
    suite = tmp_path / "suite_mine.yaml"
    suite.write_text("benchmarks: [chartqa, docvqa, pope]\n")
    given = ("--suite", suite, "--data_root", root)
    said = {"is no. 1?\nThe last": "red", "is no. 2?\nThe last": "red", "a no. 1?": "Yes"}
    said |= {"a no. 2?": "No", "a no. 3?": "No"}
    with knowing({**said, "a no. 2?": 400}) as server:
        assert run(server, tmp_path, *given) == 2
    output = capsys.readouterr()
    assert (
        output.out == "docvqa (native): ANLS 100.00 (n 2 of 5,349, unparsed 0.0%, truncated 0.0%)\n"
    )
    assert "error: chartqa: " in output.err and "no data of chartqa" in output.err
    assert "error: pope (native): no score, 1 of 3 samples" in output.err
    families.chartqa(root, [("human_test", "7"), ("augmented_test", "8")])
    said |= {"is no. 1?\n\nThe last": "ANSWER: 7", "is no. 2?\n\nThe last": "ANSWER: 8"}
    with knowing({**said, "a no. 2?": 400}) as server:
        assert run(server, tmp_path, *given, "--resume") == 1
        assert numbers(server) == [1, 2, 2]
    with knowing(said) as server:
        assert run(server, tmp_path, *given, "--resume") == 0
        assert numbers(server) == [2]
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["chartqa", "docvqa", "chartqa", "docvqa", "pope"]


def test_a_judge_in_a_suite_scores_only_where_it_belongs(data, tmp_path):
    with knowing(ANSWERS, models=("fake-vl", "judge")) as server:
        judge = ("--judge", f"{server.url},judge")
        assert run(server, tmp_path, "custom", "--data_root", data, *judge) == 0
        assert {request["model"] for request in server.requests} == {"fake-vl"}
    assert evidence(tmp_path)["result"]["protocol"]["judge"] is None


def kill_at(moment: int, folder: Path, file: Path) -> None:
    """kill -9 of the command when `moment` answers have come and another is waited for."""
    with knowing(ANSWERS, holds_after=moment) as server:
        words = arguments(server, folder, "custom", "--data_root", file, "--concurrency", 1)
        process = subprocess.Popen([sys.executable, ROOT / "eval" / "run.py", *words])
        while server.answered <= moment:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    "moment", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 3))]
)
def test_kill_9_and_resume(moment, data, tmp_path, whole, capsys):
    kill_at(moment, tmp_path, data)
    assert not (tmp_path / "results" / "mine" / "custom" / "result.json").exists()
    with knowing(ANSWERS) as server:
        assert run(server, tmp_path, "custom", "--data_root", data, "--resume") == 0
        assert numbers(server) == list(range(moment + 1, 5))
    assert capsys.readouterr().out == LINE
    assert evidence(tmp_path) == whole


@pytest.mark.parametrize("lost", [["result.json"], ["result.json", "samples.jsonl", "reviews"]])
def test_killed_after_the_last_answer(lost, data, tmp_path, whole):
    """What there is between the last answer and the result."""
    given = ("custom", "--data_root", data)
    with knowing(ANSWERS) as server:
        assert run(server, tmp_path, *given) == 0
        for name in lost:
            for path in (tmp_path / "results").rglob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run(server, tmp_path, *given) == 2  # there is something to lose
        assert run(server, tmp_path, *given, "--resume") == 0
        assert len(server.requests) == 4
    assert evidence(tmp_path) == whole

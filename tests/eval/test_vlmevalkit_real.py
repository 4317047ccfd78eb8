"""Runs of VLMEvalKit itself, in its own environment, against a server whose answers are known."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import vlmevalkit
from eval.result import EvalError
from eval.vlmevalkit_journal import EMPTY, FAILED
from tests.eval import tables
from tests.eval.known_endpoint import KnownHandler, knowing
from tests.eval.real_vlmevalkit import FIXTURES, NEEDED, PATCHED, ask

pytestmark = NEEDED
MMMU = {
    "no. 1?": "A",
    "no. 2?": "The answer is B.",
    "no. 3?": "A",  # wrong
    "no. 4?": "black",
    "no. 5?": "<think>B, or C?</think>\n\nA",
    "no. 6?": "I do not know",  # unparsable
    "no. 7?": {"content": "", "finish_reason": "length"},
    "no. 8?": "42",
}
"""Right: both of dev, and 4, 5, 8 of the six of validation."""


def no_of(request: dict) -> int:
    return int(re.search(r"no\. (\d+)\?", json.dumps(request))[1])


def test_mmmu_right_wrong_unparsable_empty_and_with_thoughts(tmp_path):
    tables.mmmu(tmp_path / "data")
    with knowing(MMMU) as server:
        result, samples = ask(server, tmp_path, "mmmu_recipe")
    assert result.complete and result.n == 8
    assert result.score == pytest.approx(100 * 5 / 8)
    assert result.subsets == {
        "dev": {"score": 100.0, "n": 2},
        "validation": {"score": 50.0, "n": 6},
    }
    assert {n for n, sample in samples.items() if sample.score == 1} == set("12458")
    assert (result.unparsed, result.truncated) == (2 / 8, 1 / 8)
    assert samples["5"].raw == "<think>B, or C?</think>\n\nA" and samples["5"].extracted == "A"
    assert samples["6"].extracted is None and samples["7"].truncated
    assert all(Path(sample.images[0]).is_file() for sample in samples.values())
    request = server.requests[0]
    assert (request["temperature"], request["max_tokens"]) == (0.6, 512)
    assert "chat_template_kwargs" not in request


def test_the_recipes_block_gives_the_same_score(tmp_path):
    tables.mmmu(tmp_path / "data")
    said = {**MMMU, "no. 5?": "A"}  # it takes no thoughts away
    with knowing(said) as server:
        subprocess.run(
            [vlmevalkit.PYTHON, FIXTURES / "recipe_block.py", server.url, tmp_path / "outputs"],
            env={**os.environ, "LMUData": str(tmp_path / "data")},
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        result, _ = ask(server, tmp_path, "mmmu_recipe")
    (table,) = (tmp_path / "outputs").rglob("*_acc.csv")
    lines = [line.replace('"', "").split(",") for line in table.read_text().splitlines()]
    theirs = {line[0]: 100 * float(line[1]) for line in lines[1:]}
    assert theirs == {name: figure["score"] for name, figure in result.subsets.items()}
    assert result.score == pytest.approx((2 * theirs["dev"] + 6 * theirs["validation"]) / 8)


def test_what_failed_gives_no_score_and_only_that_is_asked_again(tmp_path):
    tables.mmmu(tmp_path / "data")
    with knowing({**MMMU, "no. 4?": 500, "no. 5?": 500}) as server:
        result, samples = ask(server, tmp_path, "mmmu_recipe")
    assert not result.complete and result.score is None and result.subsets == {}
    assert (result.n, result.errored, result.missing) == (8, 2, 0)
    assert "HTTP 500" in samples["4"].error and samples["4"].score is None
    with knowing(MMMU) as server:
        result, samples = ask(server, tmp_path, "mmmu_recipe", resume=True)
    assert sorted(map(no_of, server.requests)) == [4, 5]
    assert result.complete and result.score == pytest.approx(100 * 5 / 8)
    assert samples["4"].score == 1 and samples["7"].truncated
    with knowing({f"no. {n}?": "D" for n in range(1, 9)}) as server:  # nothing stale without it
        result, _ = ask(server, tmp_path, "mmmu_recipe")
    assert result.score == pytest.approx(100 * 1 / 8) and len(server.requests) == 8


def test_a_name_that_the_library_changes_for_its_files(tmp_path):
    tables.mmmu(tmp_path / "data")
    named = {"model": "org/my.vl:1"}
    with knowing({**MMMU, "no. 4?": 500}, models=("org/my.vl:1",)) as server:
        result, samples = ask(server, tmp_path, "mmmu_recipe", **named)
        assert {request["model"] for request in server.requests} == {"org/my.vl:1"}
    assert result.errored == 1 and "HTTP 500" in samples["4"].error and samples["7"].truncated
    with knowing(MMMU, models=("org/my.vl:1",)) as server:
        result, samples = ask(server, tmp_path, "mmmu_recipe", resume=True, **named)
    assert list(map(no_of, server.requests)) == [4]
    assert result.score == pytest.approx(100 * 5 / 8) and result.truncated == 1 / 8
    assert samples["5"].raw.startswith("<think>")


def test_an_empty_answer_is_asked_for_once_and_scored_as_wrong(tmp_path):
    tables.mmmu(tmp_path / "data")
    with knowing({**MMMU, "no. 6?": {"content": None}}) as server:
        result, samples = ask(server, tmp_path, "mmmu_recipe", retries=2)
    assert len(server.requests) == 8 and result.score == pytest.approx(100 * 5 / 8)
    assert [(samples[n].raw, samples[n].extracted, samples[n].score) for n in "67"] == [
        ("", None, 0),
        ("", None, 0),
    ]
    with knowing(MMMU) as server:
        result, _ = ask(server, tmp_path, "mmmu_recipe", resume=True)
    assert server.requests == [] and result.score == pytest.approx(100 * 5 / 8)


@pytest.mark.parametrize(
    ("answer", "mvbench", "video_mme"),
    [
        (EMPTY, 0, 0),
        ("A", 1, 1),
        (f"{FAILED}.", -1, 1),  # why an empty answer is not handed on as it is
    ],
)
def test_the_scorers_for_videos_take_no_empty_answer_for_one(tmp_path, answer, mvbench, video_mme):
    found = subprocess.run(
        [vlmevalkit.PYTHON, FIXTURES / "score_videos.py", answer, tmp_path],
        env={**os.environ, "PRED_FORMAT": "tsv"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(found.stdout.splitlines()[-1]) == {
        "MVBench": [abs(mvbench), mvbench],
        "VideoMME": [video_mme, video_mme],
    }


def test_a_server_that_dies_and_comes_back(tmp_path):
    tables.mmmu(tmp_path / "data")
    with knowing(MMMU, breaks_after=3) as server:
        result, _ = ask(server, tmp_path, "mmmu_recipe", concurrency=1)
    assert result.errored == 5 and result.score is None
    with knowing(MMMU) as server:
        result, _ = ask(server, tmp_path, "mmmu_recipe", resume=True)
    assert sorted(map(no_of, server.requests)) == [4, 5, 6, 7, 8]
    assert result.score == pytest.approx(100 * 5 / 8)


def test_a_dead_server_is_no_score_of_zero(tmp_path):
    tables.mmmu(tmp_path / "data")
    with knowing(MMMU) as server:
        pass
    result, samples = ask(server, tmp_path, "mmmu_recipe")
    assert (result.score, result.errored, result.n) == (None, 8, 8)
    assert "ConnectionError" in samples["1"].error


def test_kill_9_takes_the_worker_along_and_loses_no_answer(tmp_path):
    tables.mmmu(tmp_path / "data")
    script = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as S\n"
        "from tests.eval import real_vlmevalkit as t\n"
        "t.ask(S(url=sys.argv[1]), Path(sys.argv[2]), 'mmmu_recipe', concurrency=1)"
    )
    with knowing(MMMU, holds_after=3) as server:
        process = subprocess.Popen([sys.executable, "-c", script, server.url, str(tmp_path)])
        while server.answered < 4:
            assert process.poll() is None
            time.sleep(0.05)
        workers = [pid for pid in os.listdir("/proc") if _is_worker_of(pid, tmp_path)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        for _ in range(200):  # a worker that lives on waits for the server for a minute
            if not any(_is_worker_of(pid, tmp_path) for pid in workers):
                break
            time.sleep(0.05)
        assert workers and not any(_is_worker_of(pid, tmp_path) for pid in workers)
    with knowing(MMMU) as server:
        result, _ = ask(server, tmp_path, "mmmu_recipe", resume=True)
    assert len(server.requests) == 5 and result.score == pytest.approx(100 * 5 / 8)


def _is_worker_of(pid: str, folder: Path) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return PATCHED[0].encode() in command and str(folder).encode() in command


def test_a_table_that_the_library_does_not_know_is_not_overwritten(tmp_path):
    tables.mmmu(tmp_path / "data")
    table = tmp_path / "data" / "MMMU_DEV_VAL.tsv"
    before = table.read_bytes()
    with knowing(MMMU) as server:
        with pytest.raises(EvalError, match=r"MMMU_DEV_VAL\.tsv has the md5"):
            ask(server, tmp_path, "mmmu_recipe", worker=vlmevalkit.WORKER)
        assert table.read_bytes() == before
        table.unlink()
        with pytest.raises(EvalError, match=r"has no MMMU_DEV_VAL\.tsv; get it from http"):
            ask(server, tmp_path, "mmmu_recipe", worker=vlmevalkit.WORKER)
    assert server.requests == []


def test_a_name_that_the_library_takes_for_another_service_and_a_key(tmp_path):
    tables.mmmu(tmp_path / "data")
    with knowing(MMMU, models=("ernie-o1",)) as server:
        result, _ = ask(server, tmp_path, "mmmu_recipe", model="ernie-o1", limit=3)
        assert server.requests[0]["max_tokens"] == 512 and result.n == 3
        result, samples = ask(server, tmp_path, "mmmu_recipe", limit=3, api_key="s3cret-key")
    assert result.errored == 3 and "HTTP 401" in samples["1"].error
    for path in (tmp_path / "result").rglob("*"):
        assert not path.is_file() or b"s3cret-key" not in path.read_bytes(), path


class EchoingHandler(KnownHandler):
    """Lets nobody in, and repeats the key that it was shown."""

    def _authorised(self) -> bool:
        self._error(401, f"not welcome: {self.headers['Authorization']}")
        return False


def test_a_key_that_the_server_repeats_is_not_kept(tmp_path):
    tables.mmmu(tmp_path / "data")
    with knowing(MMMU) as server:
        server.RequestHandlerClass = EchoingHandler
        _, samples = ask(server, tmp_path, "mmmu_recipe", limit=3, api_key="s3cret-key")
    assert "not welcome: Bearer ***" in samples["1"].error
    for path in (tmp_path / "result").rglob("*"):
        assert not path.is_file() or b"s3cret-key" not in path.read_bytes(), path

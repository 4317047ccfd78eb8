"""Batches: every row once, right, in whatever order; killed and resumed; never mixed up."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serve.chat import main
from serve.conversation import Answer, Sampling
from serve.endpoint import Endpoint
from serve.local import Local
from tests.serve.fake_endpoint import serving
from tests.serve.processes import wait_until
from tests.tiny import write_hybrid
from vlm.data.schema import Message, Sample

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "tests/golden/images"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hybrid(tmp_path_factory.mktemp("batch") / "model")


def ask(text, images=(), answer=None):
    messages = [{"role": "user", "content": text}]
    messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    return {"messages": messages, "images": list(images)}


def write(path, rows):
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return path


def read(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)  # none twice
    return by_id


def test_a_batch_of_a_checkpoint(folder, tmp_path, capsys):
    """Ragged rows in batches of two answer as each alone; bad rows are named, others go on."""
    shutil.copyfile(IMAGES / "sq56.png", tmp_path / "here.png")
    damaged = (IMAGES / "exif3.jpg").read_bytes()[:600]
    (tmp_path / "damaged.jpg").write_bytes(damaged)
    parts = [
        {"type": "image_url", "image_url": {"url": str(IMAGES / "r126x70.png")}},
        {"type": "text", "text": "in parts?"},
    ]
    rows = [
        ask("<image>what is it?", ["here.png"], answer="a square"),
        ask("a much longer question, " * 9),
        "not JSON",
        ask("<image>", ["later.png"]),
        "",
        ask("<image>", ["damaged.jpg"]),
        {"messages": [{"role": "user", "content": parts}]},
        ask("short"),
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "new/out.jsonl"
    command = [str(folder), "--input", str(source), "--output", str(output)]
    command += ["--batch_size", "2", "--max_new_tokens", "5"]
    assert main(command) == 1
    assert "3 rows failed" in capsys.readouterr().err
    answers = read(output)
    assert list(answers) and set(answers) == {f"in.jsonl:{n}" for n in (1, 2, 3, 4, 6, 7, 8)}
    assert "not a line of JSON" in answers["in.jsonl:3"]["error"]
    assert "later.png does not exist" in answers["in.jsonl:4"]["error"]
    assert "damaged.jpg" in answers["in.jsonl:6"]["error"]
    assert answers["in.jsonl:1"]["label"] == "a square" and "label" not in answers["in.jsonl:8"]

    local, sampling = Local(folder), Sampling(max_new_tokens=5)
    alone = {
        1: Sample("x", (Message("user", "<image>what is it?"),), (tmp_path / "here.png",)),
        2: Sample("x", (Message("user", rows[1]["messages"][0]["content"]),)),
        7: Sample("x", (Message("user", "<image>in parts?"),), (IMAGES / "r126x70.png",)),
        8: Sample("x", (Message("user", "short"),)),
    }
    for number, conversation in alone.items():
        row = answers[f"in.jsonl:{number}"]
        expected = local.ask(conversation, sampling, lambda text: None)
        assert Answer(row["response"], row["finish_reason"]) == expected

    shutil.copyfile(IMAGES / "sq56.png", tmp_path / "later.png")
    assert main(command) == 1  # what failed is tried again, what is answered stays
    again = read(output)
    assert again["in.jsonl:4"]["response"] and "error" in again["in.jsonl:3"]
    assert {i: r for i, r in again.items() if "response" in r and i != "in.jsonl:4"} == {
        i: r for i, r in answers.items() if "response" in r
    }


def test_a_killed_batch_goes_on_where_it_was(tmp_path):
    rows = [ask("say one"), ask("say two", answer="zwei"), ask("hang"), ask("say four")]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with serving() as server:
        command = [server.url, "--input", str(source), "--output", str(output), "--batch_size", "1"]
        child = subprocess.Popen([sys.executable, "serve/chat.py", *command], cwd=ROOT)
        assert wait_until(lambda: len(server.requests) == 3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        with open(output, "a") as file:
            file.write('{"id": "in.jsonl:3", "response": "torn"}')  # before its line feed
        server.released.set()
        assert main(command) == 0
        asked = [request["messages"][-1]["content"] for request in server.requests]
        assert asked == ["say one", "say two", "hang", "hang", "say four"]
        assert main(command) == 0 and len(server.requests) == 5
    answers = read(output)
    assert [row["response"] for row in answers.values()] == ["one", "two", "wait", "four"]
    assert answers["in.jsonl:2"]["label"] == "zwei"


def test_requests_run_side_by_side_and_a_failed_one_is_a_row(tmp_path):
    rows = [ask("hang"), ask("hang"), ask("fail 400"), ask("fail 500"), ask("hang")]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with serving() as server:
        command = [server.url, "--input", str(source), "--output", str(output), "--batch_size", "3"]
        code = []
        run = threading.Thread(target=lambda: code.append(main(command)))
        run.start()
        together = wait_until(lambda: server.now == 3)
        server.released.set()
        run.join()
        assert together and server.most_at_once == 3 and code == [1]
    answers = read(output)
    assert "400: as asked for" in answers["in.jsonl:3"]["error"]
    assert "500: as asked for" in answers["in.jsonl:4"]["error"]
    assert sum("response" in row for row in answers.values()) == 3


def test_a_dead_endpoint_stops_the_batch_and_fails_no_row(tmp_path, capsys):
    rows = [ask("say one"), ask("fail 404"), *[ask("say more")] * 20]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with serving() as server:
        command = [server.url, "--input", str(source), "--output", str(output), "--batch_size", "1"]
        assert main(command) == 2
    assert "check the URL and --model_name" in capsys.readouterr().err
    assert list(read(output)) == ["in.jsonl:1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--temperature", "0.5"], "made with temperature 0.0, not 0.5"),
        (["--thinking", "false"], "made with thinking None, not False"),
        (["--model_name", "fake-2"], "made with model 'fake-vl', not 'fake-2'"),
        ("input", "made with input_sha256"),
        ("foreign", "exists and has no out.jsonl.settings.json"),
        (["--output", "/proc/none/out.jsonl"], "cannot be used"),
        (["--input", "/no/such.jsonl"], "/no/such.jsonl cannot be read"),
    ],
)
def test_answers_of_other_settings_are_never_mixed(tmp_path, capsys, change, message):
    source, output = write(tmp_path / "in.jsonl", [ask("say one")]), tmp_path / "out.jsonl"
    with serving(models=("fake-vl", "fake-2")) as server:
        command = [server.url, "--input", str(source), "--output", str(output)]
        assert main([*command, "--model_name", "fake-vl"]) == 0
        before = output.read_bytes()
        if change == "input":
            write(source, [ask("say two")])
        elif change == "foreign":
            (tmp_path / "out.jsonl.settings.json").unlink()
        changed = change if isinstance(change, list) else []
        assert main([*command, "--model_name", "fake-vl", *changed]) == 2
        assert len(server.requests) == 1 and output.read_bytes() == before
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_error_in_reading_rows_is_raised_and_not_waited_for():
    def rows():
        yield Sample("x", (Message("user", "say one"),))
        raise OSError("the disk is gone")

    with serving() as server, pytest.raises(OSError, match="the disk is gone"):
        list(Endpoint(server.url).ask_many(rows(), Sampling(), 2))

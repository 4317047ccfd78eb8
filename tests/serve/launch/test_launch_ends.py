"""Nothing outlives the launcher, however it or its server ends.

Processes are real ones; `vllm` is tests/serve/fake_vllm.py.
"""

import json
import os
import signal
import subprocess
from dataclasses import replace

import pytest

from serve.launch import ServerError, running_server
from serve.serve_config import parse
from tests.serve.processes import command_lines, free_port, group_of, living, wait_until


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(launch, fake_vllm, number):
    key = f"secret-{os.urandom(8).hex()}"
    launcher = launch("--api_key", key, "--", "--seed", "3", MAX_PIXELS="200704")
    launcher.until("serving Qwen3-VL at http://127.0.0.1:")
    given = json.loads(fake_vllm.read_text())
    assert living(given["group"]) and given["key"] == key
    assert key not in command_lines()
    assert launcher.send(number) == 0
    assert not living(given["group"])
    said = launcher.output.read_text()
    assert key not in said and "fake vLLM: loading" in said
    assert "max_pixels 200704 (MAX_PIXELS=200704)" in said
    shown = next(line for line in said.splitlines() if "vllm serve" in line)
    assert shown.endswith("--seed 3")
    pasted = subprocess.check_output(["sh", "-c", f"printf '%s\\n' {shown}"], text=True)
    assert pasted.splitlines()[-len(given["arguments"]) :] == given["arguments"]


def test_one_that_does_not_heed_sigterm_is_killed(launch, fake_vllm):
    launcher = launch("--stop_timeout", 0.5, FAKE_VLLM="stubborn")
    launcher.until("serving")
    assert launcher.send(signal.SIGTERM) == 0
    assert not living(group_of(fake_vllm))


def test_a_signal_while_it_loads(launch, fake_vllm):
    launcher = launch(FAKE_VLLM="hangs")
    group = group_of(fake_vllm)
    assert launcher.send(signal.SIGINT) == 0
    assert not living(group) and not launcher.said("Traceback")


def test_kill_9_takes_vllm_along(launch, fake_vllm):
    launcher = launch()
    launcher.until("serving")
    group = group_of(fake_vllm)
    assert launcher.send(signal.SIGKILL) == -signal.SIGKILL
    assert wait_until(lambda: not living(group)), living(group)


def test_without_its_guard_the_server_lasts_and_stops_as_ever(launch, fake_vllm):
    launcher = launch()
    launcher.until("serving")
    group = launcher.group()
    os.kill(group, signal.SIGKILL)
    assert group_of(fake_vllm) == group and len(living(group)) >= 3
    assert launcher.send(signal.SIGTERM) == 0
    assert not living(group)


def test_the_server_that_dies_takes_its_engine_along(launch, fake_vllm):
    launcher = launch()
    launcher.until("serving")
    given = json.loads(fake_vllm.read_text())
    os.kill(given["pid"], signal.SIGKILL)
    assert launcher.process.wait(60) == 137
    assert not living(given["group"])
    assert launcher.said("vLLM ended with exit code 137")


def test_one_that_fails_is_reported_with_its_last_words(launch, tmp_path, fake_vllm):
    log = tmp_path / "vllm.log"
    launcher = launch("--log", log, FAKE_VLLM="fails")
    assert launcher.process.wait(60) == 3
    said = launcher.output.read_text()
    assert f"error: vLLM ended with exit code 3 before it answered; {log} ends with:" in said
    assert said.endswith("ValueError: no such kernel\n")
    assert not living(group_of(fake_vllm))


def test_one_that_never_answers_is_given_up(model, monkeypatch, fake_vllm):
    monkeypatch.setenv("FAKE_VLLM", "hangs")
    config = replace(parse([str(model)]), port=free_port(), start_timeout=1.5)
    with pytest.raises(ServerError, match=r"took more than 1\.5 s"), running_server(config):
        pass
    assert not living(group_of(fake_vllm))


def test_a_server_lasts_as_long_as_its_block(model, tmp_path, fake_vllm):
    config = replace(parse([str(model)]), port=free_port(), log=tmp_path / "log")
    with pytest.raises(KeyError), running_server(config) as url:
        assert url == f"http://127.0.0.1:{config.port}/v1"
        group = group_of(fake_vllm)
        assert living(group)
        raise KeyError
    assert not living(group)
    assert "fake vLLM: loading" in (tmp_path / "log").read_text()

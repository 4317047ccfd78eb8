"""Serve a model through vLLM with the recipe's limits.

    python serve/launch.py DIR
    python serve/launch.py DIR --config configs/serve.yaml --port 9000 --api_key KEY
    python serve/launch.py DIR --tensor_parallel_size 2 --replicas 4 -- --max-num-seqs 64
    python serve/launch.py DIR --nnodes 2 --node_rank R --master_addr HOST --tensor_parallel_size 16

Prints the `vllm serve` command, waits until it answers, and stops it on Ctrl-C or SIGTERM. A
mistake in what was asked for is one sentence and exit code 2; a vLLM that fails gives its own.

Other code starts a server by `with running_server(config) as url:`.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from serve.api_key import hide_api_key
from serve.guard import ORPHANS_SECONDS
from serve.preflight import check, find_vllm
from serve.serve_config import API_KEY, ServeConfig, parse, vllm_command
from serve.usage import UsageError
from serve.vllm_env import is_cpu, vllm_environment
from vlm.data.limits import ENVIRONMENT
from vlm.hf_config import ConfigError
from vlm.hub import resolve_model

GUARD = Path(__file__).with_name("guard.py")
POLL_SECONDS, REPORT_SECONDS = 0.1, 15.0
LOG_LINES = 20


class ServerError(RuntimeError):
    """vLLM ended, or did not answer in time; `code` is the exit code for it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def running_server(config: ServeConfig) -> Iterator[str]:
    """A server that answers, as long as the block lasts; its OpenAI base URL (`.../v1`).

    Raises:
        UsageError: the model, the machine or the port will not do.
        ServerError: vLLM ended, or did not answer within `start_timeout`.
    """
    config = with_model_here(config)
    check(config, is_cpu())
    with Vllm(config) as vllm:
        vllm.wait_until_ready()
        yield f"{config.url}/v1"


def with_model_here(config: ServeConfig) -> ServeConfig:
    """The config with the model's directory, downloaded if it is a hub's; UsageError if not."""
    try:
        return replace(config, model=resolve_model(config.model, config.hub))
    except ConfigError as error:
        raise UsageError(str(error)) from None


class Vllm:
    """The processes of `vllm serve`: one group, led by its guard. Leaving the block ends them."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        command = [find_vllm(), *vllm_command(config, is_cpu())[1:]]
        environment = {**os.environ, **vllm_environment()}
        environment.pop(API_KEY, None)
        if config.api_key:
            environment[API_KEY] = config.api_key
        # A group of its own: Ctrl-C in the terminal is for the launcher alone.
        self.guard = subprocess.Popen(
            [sys.executable, str(GUARD), str(config.stop_timeout)],
            stdin=subprocess.PIPE,
            process_group=0,
        )
        output = config.log.open("wb") if config.log else None
        self.server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=self.guard.pid,
        )
        self.guard.stdin.write(str(self.server.pid).encode())
        self.guard.stdin.flush()
        if output:
            output.close()

    def __enter__(self) -> "Vllm":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.server.terminate()  # it stops its engines in order
        with suppress(subprocess.TimeoutExpired):
            self.server.wait(self.config.stop_timeout)
        self.server.kill()
        self.server.wait()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._end_group(number)
        self.guard.stdin.close()

    def _end_group(self, number: signal.Signals) -> None:
        """Signal what is left of the group, and wait until it is gone."""
        end = time.monotonic() + ORPHANS_SECONDS
        with suppress(ProcessLookupError):
            os.killpg(self.guard.pid, number)
            while time.monotonic() < end:
                self.guard.poll()
                os.killpg(self.guard.pid, 0)
                time.sleep(POLL_SECONDS)

    @property
    def exit_code(self) -> int:
        """That of the server once it has ended, in a shell's manner where a signal ended it."""
        code = self.server.returncode
        return code if code >= 0 else 128 - code

    def wait_until_ready(self) -> None:
        """Wait for /health; ServerError if vLLM ends first or `start_timeout` passes."""
        started = reported = time.monotonic()
        while not _healthy(self.config.url):
            if self.server.poll() is not None:
                self.fail(f"vLLM ended with exit code {self.exit_code}", self.exit_code or 1)
            now = time.monotonic()
            if now - started > self.config.start_timeout:
                self.fail(f"vLLM took more than {self.config.start_timeout:g} s (start_timeout)", 1)
            if now - reported > REPORT_SECONDS:
                reported = now
                print(f"waiting for {self.config.url} since {now - started:.0f} s", flush=True)
            time.sleep(POLL_SECONDS)

    def fail(self, what: str, code: int) -> NoReturn:
        """Raise ServerError with the end of the log, if there is one."""
        log = self.config.log
        if log is None:
            raise ServerError(f"{what} before it answered; its messages are above", code)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        last = "\n".join(lines)
        raise ServerError(f"{what} before it answered; {log} ends with:\n{last}", code)


def _healthy(url: str) -> bool:
    # without a proxy: this is a server of our own
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def introduction(config: ServeConfig) -> str:
    """The command in full, ready to be pasted, and what the environment decided."""
    added = [f"{name}={shlex.quote(value)}" for name, value in sorted(vllm_environment().items())]
    lines = [" ".join([*added, shlex.join(vllm_command(config, is_cpu()))])]
    for variable, option in ENVIRONMENT.items():
        if variable in os.environ:
            value = getattr(config.limits, option)
            ruled = "" if str(value) == os.environ[variable] else ", overruled by an option"
            lines.append(f"{option} {value} ({variable}={os.environ[variable]}{ruled})")
    return "\n".join(lines)


def greeting(config: ServeConfig) -> str:
    """Where the server is, and a request to try."""
    key = f' -H "Authorization: Bearer ${API_KEY}"' if config.api_key else ""
    question = (
        f'{{"model": "{config.served_model_name}", '
        '"messages": [{"role": "user", "content": "Hello!"}]}'
    )
    return (
        f"serving {config.served_model_name} at {config.url}/v1, until Ctrl-C\n"
        f"  curl {config.url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(question)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Serve until vLLM ends or a signal comes; returns the exit code."""
    try:
        if arguments is None:
            hide_api_key(API_KEY)
            arguments = sys.argv[1:]
        config = with_model_here(parse(arguments))
        check(config, is_cpu())
        print(introduction(config), flush=True)
        _catch_signals()
        with Vllm(config) as vllm:
            if config.answers:
                vllm.wait_until_ready()
                print(greeting(config), flush=True)
            vllm.server.wait()
        print(f"vLLM ended with exit code {vllm.exit_code}", file=sys.stderr)
        return vllm.exit_code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 0


def _catch_signals() -> None:
    """Turn the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt, and ignore later ones."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup asked for it
        signals.append(signal.SIGHUP)

    def interrupt(_signal: int, _frame: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, interrupt)


if __name__ == "__main__":
    sys.exit(main())

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
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.preflight import check, find_vllm
from serve.serve_config import (
    API_KEY,
    ENVIRONMENT,
    ServeConfig,
    UsageError,
    parse,
    take_api_key,
    vllm_command,
)
from serve.vllm_env import is_cpu, vllm_environment

GUARD = Path(__file__).with_name("guard.py")
POLL_SECONDS, REPORT_SECONDS = 0.2, 15.0
LOG_LINES = 20


class ServerError(RuntimeError):
    """vLLM ended, or did not answer in time."""


@contextmanager
def running_server(config: ServeConfig) -> Iterator[str]:
    """A server that answers, as long as the block lasts; its OpenAI base URL (`.../v1`).

    Raises:
        UsageError: the model, the machine or the port will not do.
        ServerError: vLLM ended, or did not answer within `start_timeout`.
    """
    check(config, is_cpu())
    guard = start(config)
    try:
        wait_until_ready(config, guard)
        yield f"{config.url}/v1"
    finally:
        stop(guard)


def start(config: ServeConfig) -> subprocess.Popen:
    """Start vLLM under its guard, which stops it when it is told to or this process dies."""
    command = [find_vllm(), *vllm_command(config, is_cpu())[1:]]
    environment = {**os.environ, **vllm_environment()}
    environment.pop(API_KEY, None)
    if config.api_key:
        environment[API_KEY] = config.api_key
    output = config.log.open("wb") if config.log else None
    try:
        return subprocess.Popen(
            [sys.executable, str(GUARD), str(config.stop_timeout), *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C in the terminal is for the launcher alone
        )
    finally:
        if output:
            output.close()


def stop(guard: subprocess.Popen) -> int:
    """Stop vLLM and wait until no process of it is left; returns its exit code."""
    guard.terminate()
    code = guard.wait()
    guard.stdin.close()
    return code if code >= 0 else 128 - code  # the guard itself was killed


def wait_until_ready(config: ServeConfig, guard: subprocess.Popen) -> None:
    """Wait for /health; ServerError if vLLM ends first or `start_timeout` passes."""
    started = reported = time.monotonic()
    while not _healthy(config.url):
        if guard.poll() is not None:
            raise ServerError(f"vLLM ended with exit code {stop(guard)} {_last_words(config)}")
        now = time.monotonic()
        if now - started > config.start_timeout:
            raise ServerError(
                f"vLLM did not answer within {config.start_timeout:g} s (start_timeout) "
                + _last_words(config)
            )
        if now - reported > REPORT_SECONDS:
            reported = now
            print(f"waiting for {config.url} since {now - started:.0f} s", flush=True)
        time.sleep(POLL_SECONDS)


def _healthy(url: str) -> bool:
    # without a proxy: this is a server of our own
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _last_words(config: ServeConfig) -> str:
    """Where to read why, with the end of the log if there is one."""
    if config.log is None:
        return "before it answered; its messages are above"
    lines = config.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"before it answered; {config.log} ends with:", *lines])


def introduction(config: ServeConfig) -> str:
    """The command in full, ready to be pasted, and what the environment decided."""
    added = [f"{name}={shlex.quote(value)}" for name, value in sorted(vllm_environment().items())]
    lines = [" ".join([*added, shlex.join(vllm_command(config, is_cpu()))])]
    for variable, option in ENVIRONMENT.items():
        if variable in os.environ:
            value = getattr(config, option)
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
    guard = None
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        check(config, is_cpu())
        print(introduction(config), flush=True)
        _catch_signals()
        guard = start(config)
        if config.answers:
            wait_until_ready(config, guard)
            print(greeting(config), flush=True)
        guard.wait()
        code = stop(guard)
        print(f"vLLM ended with exit code {code}", file=sys.stderr)
        return code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if guard.poll() is None else stop(guard) or 1
    except KeyboardInterrupt:
        return 0
    finally:
        if guard is not None:
            stop(guard)


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


def _hide_api_key() -> None:
    """Start anew with the key in the environment; everybody can read a command line."""
    key, others = take_api_key(sys.argv[1:])
    if others != sys.argv[1:]:
        python = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        os.execve(sys.executable, [*python, *others], {**os.environ, API_KEY: key or ""})


if __name__ == "__main__":
    _hide_api_key()
    sys.exit(main())

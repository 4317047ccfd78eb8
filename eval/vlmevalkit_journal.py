"""Every exchange with a server, one line each: what a run that is resumed does not ask again.

Runs inside VLMEvalKit's environment (eval/vlmevalkit_worker.py); the library throws away why there
is no answer, whether one was cut off, and the thoughts before it.
"""

import functools
import hashlib
import json
import os
import threading
from collections import defaultdict
from pathlib import Path

PROGRESS = "@progress"
"""Begins a line of the worker's that says how many samples are done."""
FAILED = "Failed to obtain answer via API"
"""The library's words for no answer."""
EMPTY = "\N{EMPTY SET}"
"""What the library gets for an empty answer: a text that no scorer takes for one. To it an empty
one has failed, and its scorers for videos take its words for that as right, or as option A."""
KEYS = ("MODEL_API_KEY", "OPENAI_API_KEY")
"""Environment variables that hold the keys: the model's, and the judge's."""


class Journal:
    """Answers by what was asked, on disk as they come; failures are kept in memory too."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.answers: dict[str, list[dict]] = defaultdict(list)
        """Key -> answers in the order in which they came, those of this run and before."""
        self.failures: dict[str, str] = {}
        """Key -> the last reason for which there is no answer."""
        self.judge_failures: dict[str, str] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines:
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # empty, or torn by a kill
            self.answers[answer["key"]].append(answer)
        self.unused = {key: list(answers) for key, answers in self.answers.items()}
        # A line of its own even after a torn one.
        self.file = path.open("ab", buffering=0)
        self.file.write(b"\n" if lines and lines[-1] else b"")

    def take(self, key: str) -> dict | None:
        """An answer of an earlier run; each is given once, as each was asked for once."""
        with self.lock:
            return self.unused[key].pop(0) if self.unused.get(key) else None

    def add(self, key: str, message: dict, finish_reason: str | None) -> None:
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        answer = {
            "key": key,
            "content": message.get("content"),
            "thoughts": thoughts,
            "finish_reason": finish_reason,
        }
        with self.lock:
            self.answers[key].append(answer)
            self.failures.pop(key, None)
            self.judge_failures.pop(key, None)
            self.file.write(json.dumps(answer).encode() + b"\n")

    def fail(self, key: str, reason: str, judge: bool) -> None:
        reason = " ".join(without_keys(reason).split())[:300]
        with self.lock:
            (self.judge_failures if judge else self.failures)[key] = reason

    def watch(self) -> None:
        """Put the journal between the library's API client and the server."""
        from vlmeval.api.gpt import OpenAIWrapper

        send, journal = OpenAIWrapper.generate_inner, self

        @functools.wraps(send)
        def generate_inner(client, inputs, **kwargs):
            key = key_of(inputs, client.model, client.temperature, client.max_tokens, kwargs)
            judge = not getattr(client, "is_asked", False)
            if judge and "LOCAL_LLM" not in os.environ:  # the library would ask OpenAI
                journal.fail(key, "none is named; name one with --judge URL,MODEL", judge)
                raise PermissionError("no judge is named")
            known = journal.take(key)
            if known is not None:
                return 0, said(known["content"], judge, client.fail_msg), "journal"
            try:
                code, _, response = send(client, inputs, **kwargs)
            except Exception as error:
                journal.fail(key, f"{type(error).__name__}: {error}", judge)
                raise
            try:
                choice = json.loads(response.text)["choices"][0]
                message, finish_reason = choice["message"], choice.get("finish_reason")
            except (ValueError, LookupError, TypeError):
                code = code or "200, but no completion"
            if code:
                journal.fail(key, f"HTTP {code}: {response.text}", judge)
                return -1, client.fail_msg, response
            journal.add(key, message, finish_reason)
            return code, said(message.get("content"), judge, client.fail_msg), response

        OpenAIWrapper.generate_inner = generate_inner


def said(content: str | None, judge: bool, failed: str) -> str:
    """What the library gets; a judge that says nothing has failed."""
    if is_empty(content):
        return failed if judge else EMPTY
    return content.strip()


def is_empty(content: str | None) -> bool:
    return not (content or "").strip()


def without_keys(text: str) -> str:
    """A server may repeat in an error the key that it was given."""
    for name in KEYS:
        if (key := os.environ.get(name, "EMPTY")) not in ("", "EMPTY"):
            text = text.replace(key, "***")
    return text


def key_of(message: list[dict], *settings) -> str:
    """Of a request: its texts, the bytes of its images, and how it is asked.

    System prompts are left out: the library moves them from the message to the client.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for part in message:
        if part.get("role") == "system":
            continue
        value = part.get("value", part.get("content"))
        if part.get("type") in ("image", "video"):
            digest.update(_hash_of_file(value).encode())
        else:
            digest.update(json.dumps([part.get("type"), value]).encode())
    return digest.hexdigest()


@functools.cache
def _hash_of_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

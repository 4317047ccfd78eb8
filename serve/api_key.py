"""API keys: everybody on a machine can read a command line, and nobody else an environment."""

import os
import sys

from serve.usage import UsageError

API_KEY = "OPENAI_API_KEY"
"""What OpenAI's client takes its key from."""


def take_api_key(arguments: list[str], variable: str) -> tuple[str | None, list[str]]:
    """The key, of --api_key or else of the environment variable, and the other arguments."""
    key, others, words = os.environ.get(variable), [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--api_key":
            key = value if equals else next(words, "")
            if not key:
                raise UsageError("--api_key has no value")
        elif word == "--":
            others += [word, *words]
        else:
            others.append(word)
    return key or None, others


def hide_api_key(variable: str) -> None:
    """Start this program anew with its --api_key in the environment variable.

    UsageErrors are left to the program itself, which meets them again.
    """
    try:
        key, others = take_api_key(sys.argv[1:], variable)
    except UsageError:
        return
    if others != sys.argv[1:]:
        python = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        os.execve(sys.executable, [*python, *others], {**os.environ, variable: key or ""})

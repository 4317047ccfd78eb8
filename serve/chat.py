"""Chat with a checkpoint or an OpenAI-compatible endpoint, in the terminal or in batches.

    python serve/chat.py DIR|URL                                           # a conversation
    python serve/chat.py DIR|URL --image cat.jpg --prompt "What is this?"  # one answer, streamed
    python serve/chat.py DIR|URL --input data.jsonl --output answers.jsonl # a batch; resumes

A directory, or OWNER/NAME of a hub, is answered for by our own generation; http:// or https://
names a server. Exit code 2 is a mistake in what was asked for, told in one sentence; 1 is a batch
of which rows failed.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from serve.api_key import API_KEY, hide_api_key
from serve.batch import run_batch
from serve.conversation import Backend, EndpointError, Sampling, check_image, check_video
from serve.source import find_model, limits_of
from serve.terminal import Chat, Printer, converse
from serve.usage import UsageError
from vlm.checkpoint import CheckpointError
from vlm.data.limits import ENVIRONMENT, Limits, environment_limits
from vlm.data.schema import BadSample
from vlm.hf_config import ConfigError
from vlm.hub import add_hub_argument

THINKING = {"true": True, "false": False, "auto": None}
LIMITS = tuple(field.name for field in fields(Limits))
"""Options that bound images and videos."""
OF_ENDPOINTS = ("api_key", "model_name", "timeout")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python serve/chat.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _refuse
    add = parser.add_argument
    add("model", metavar="DIR|URL", help="a checkpoint, or a server with or without /v1")
    add_hub_argument(parser)
    add("--prompt", help="ask this once and end")
    add("--image", type=Path, action="append", default=[], help="may be repeated")
    add("--video", type=Path, action="append", default=[], help="may be repeated")
    add("--system", help="system prompt (default: the model's); empty: none, of a checkpoint only")
    add("--input", type=Path, help="JSONL of conversations to answer")
    add("--output", type=Path, help="JSONL of their answers")
    add("--batch_size", type=int, default=8, help="conversations, or requests, at a time")

    add = parser.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=int, default=Sampling.max_new_tokens)
    add("--temperature", type=float, default=Sampling.temperature, help="0 is greedy")
    add("--top_p", type=float, default=Sampling.top_p)
    add("--seed", type=int, default=Sampling.seed)
    add("--thinking", choices=THINKING, default="auto", help="auto leaves it to the model")

    add = parser.add_argument_group("a checkpoint's limits (a server has its own)").add_argument
    variables = {name: variable for variable, name in ENVIRONMENT.items()}
    for name in LIMITS:
        kind = float if name == "fps" else int
        help_text = f"default: {variables[name]}, or the model's own" if name in variables else None
        add(f"--{name}", type=kind, help=help_text)

    add = parser.add_argument_group("an endpoint").add_argument
    add("--api_key", help="default: OPENAI_API_KEY")
    add("--model_name", help="default: the one that the server has")
    add("--timeout", type=float, help="seconds without a sign of life (default: 600)")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _refuse(message: str) -> NoReturn:
    raise UsageError(message)


def _check(options: argparse.Namespace) -> None:
    if (options.input is None) != (options.output is None):
        raise UsageError("--input and --output go together")
    talk = options.prompt is not None or options.image or options.video
    if options.input and (talk or options.system is not None):
        raise UsageError("--input brings its own prompts, system prompts, images and videos")
    if options.batch_size < 1:
        raise UsageError(f"batch_size is {options.batch_size}; it must be 1 or more")
    is_url = _is_url(options.model)
    for name in LIMITS if is_url else OF_ENDPOINTS:
        if getattr(options, name) is not None:
            whose = "a checkpoint; a server has its own limits" if is_url else "an endpoint"
            raise UsageError(f"--{name} is for {whose}")


def _is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def open_backend(options: argparse.Namespace) -> Backend:
    """Whoever answers; UsageError, ConfigError, CheckpointError or EndpointError if nobody can."""
    if _is_url(options.model):
        from serve.endpoint import Endpoint

        given = {} if options.timeout is None else {"timeout": options.timeout}
        endpoint = Endpoint(options.model, options.api_key, options.model_name, **given)
        endpoint.identity()  # find out now if nobody is there
        return endpoint
    from serve.local import Local

    model = find_model(options.model, options.hub)
    local = Local(model, _limits(options, model))
    if options.thinking != "auto":
        local.check_thinking()
    return local


def _limits(options: argparse.Namespace, model: Path) -> Limits:
    """Flags, then the recipe's environment, then the model's own, then the recipe."""
    given = {name: getattr(options, name) for name in LIMITS}
    flags = {name: value for name, value in given.items() if value is not None}
    try:
        return Limits(**limits_of(model) | environment_limits() | flags)
    except ValueError as error:
        raise UsageError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    """What the options ask for; the exit code."""
    given = {f.name: getattr(options, f.name) for f in fields(Sampling)}
    sampling = Sampling(**given | {"thinking": THINKING[options.thinking]})
    for path in options.image:
        check_image(path)
    for path in options.video:
        check_video(path)
    backend = open_backend(options)
    if options.input:
        failed = run_batch(backend, sampling, options.input, options.output, options.batch_size)
        if failed:
            print(f"{failed} rows failed; see error in {options.output}", file=sys.stderr)
        return 1 if failed else 0
    chat = Chat(backend, sampling, options.system)
    chat.images, chat.videos = list(options.image), list(options.video)
    if options.prompt is None:
        converse(chat, Printer(sys.stdout))
    elif chat.ask(options.prompt, Printer(sys.stdout)).finish == "length":
        print("(cut off at max_new_tokens)", file=sys.stderr)
    return 0


def main(arguments: list[str] | None = None) -> int:
    try:
        return run(parse_arguments(arguments))
    except BadSample as error:
        print(f"error: {error.reason}", file=sys.stderr)
    except (UsageError, ConfigError, CheckpointError, EndpointError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    hide_api_key(API_KEY)
    sys.exit(main())

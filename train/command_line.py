"""The command line of train/sft.py: defaults, YAML and flags become one `TrainConfig`.

An unknown or mistyped key is an error that suggests the nearest one, never ignored.
"""

import re
import sys
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_origin

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentError, ArgumentParser

from train.config import TrainConfig, UsageError
from vlm.data.limits import environment_limits

ABOUT = "Supervised fine-tuning of the hybrid; docs/training.md explains every option."


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The resolved config of a command line; UsageError in one sentence."""
    parser = ArgumentParser(
        prog="train/sft.py", description=ABOUT, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of options")
    lists = _add_lists(parser)
    parser.add_class_arguments(TrainConfig, skip=lists)
    try:
        parser.set_defaults(environment_limits())
        _check_files(sys.argv[1:] if arguments is None else arguments)
        options = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise UsageError(_explain(error)) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    options.pop("config", None)
    return TrainConfig(**options)


def _add_lists(parser: ArgumentParser) -> set[str]:
    """The options that are lists, each as `--name A B ...`; returns their names."""
    about = {p.arg_name: p.description for p in parse_from_object(TrainConfig).params}
    lists = [field for field in fields(TrainConfig) if get_origin(field.type) is list]
    for field in lists:
        (kind,) = get_args(field.type)
        needed = {"required": True} if field.default_factory is MISSING else {"default": []}
        parser.add_argument(
            f"--{field.name}", type=kind, nargs="+", help=about[field.name], **needed
        )
    return {field.name for field in lists}


def _check_files(arguments: list[str]) -> None:
    """UsageError that names a `--config` file which is not what the parser expects."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    paths = [after for flag, after in pairs if flag == "--config"]
    paths += [flag.partition("=")[2] for flag in arguments if flag.startswith("--config=")]
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "")
            raise UsageError(f"--config {path} is not YAML: {reason}") from None
        if not isinstance(content, dict):
            raise UsageError(f"--config {path} holds no options; write `name: value` lines")
        for name in ("dataset", "val_dataset", "text_probe"):
            data = content.get(name, [])
            if not isinstance(data, list) or not all(isinstance(d, str | dict) for d in data):
                raise UsageError(
                    f"--config {path}: {name} is to be a list, a line `- PATH` or `- path: PATH` "
                    "for each source"
                )


def _explain(error: ArgumentError) -> str:
    """jsonargparse's message on one line, with the nearest option for an unknown one."""
    message = " ".join(str(error).split())
    names = list(TrainConfig.__dataclass_fields__)
    words = re.findall(r"[\w-]+", message)
    if any(word in names for word in words):  # it is known, and has a wrong value
        return message
    for word in words:
        near = get_close_matches(word.lstrip("-"), names, 1, 0.75)
        if near and word.lstrip("-") not in names:
            return f"{message} (did you mean {near[0]}?)"
    return message

"""The command line of train/sft.py: defaults, YAML and flags become one `TrainConfig`.

An unknown or mistyped key is an error that suggests the nearest one, never ignored.
"""

import re
import sys
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from train.config import TrainConfig, UsageError
from train.optim import SCHEDULES
from vlm.data.limits import environment_limits

ABOUT = "Supervised fine-tuning of the hybrid; docs/training.md explains every option."
FORMS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    NoneType: "null",
}
"""What a value of a type is called in a message."""
RESUMES = "the same command resumes the run in its output_dir"
HABITS = {
    "lr": "did you mean learning_rate?",
    "batch_size": "did you mean per_device_train_batch_size?",
    "resume": RESUMES,
    "resume_from_checkpoint": RESUMES,
}
"""Options of other trainers, too far from ours in letters to be recognised."""


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The resolved config of a command line; UsageError in one sentence."""
    arguments = _bare_is_true(sys.argv[1:] if arguments is None else arguments)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train/sft.py", description=ABOUT, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of options")
    lists = _add_lists(parser)
    parser.add_class_arguments(TrainConfig, skip=lists)
    try:
        parser.set_defaults(environment_limits())
        _check_files(arguments)
        options = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise UsageError(_explain(error)) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    options.pop("config", None)
    config = TrainConfig(**options)
    if config.lr_scheduler_type not in SCHEDULES:
        names = ", ".join(SCHEDULES)
        raise UsageError(
            f"lr_scheduler_type is {config.lr_scheduler_type}; it must be one of {names}"
        )
    return config


def _bare_is_true(arguments: list[str]) -> list[str]:
    """The arguments, with `=true` at each flag of a yes or no that no value follows."""
    flags = {f"--{field.name}" for field in fields(TrainConfig) if bool in _kinds(field.type)}
    return [
        f"{word}=true" if word in flags and after.startswith("-") else word
        for word, after in pairwise([*arguments, "--"])
    ]


def _kinds(kind: Any) -> tuple:
    """The types that an option, or an element of a list, may have."""
    if get_origin(kind) is list:
        return _kinds(*get_args(kind))
    return (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)


def _add_lists(parser: ArgumentParser) -> set[str]:
    """The options that are lists, each as `--name A B ...`; returns their names."""
    about = {p.arg_name: p.description for p in parse_from_object(TrainConfig).params}
    for field in _list_fields():
        (kind,) = get_args(field.type)
        needed = {"required": True} if field.default_factory is MISSING else {"default": []}
        parser.add_argument(
            f"--{field.name}", type=kind, nargs="+", help=about[field.name], **needed
        )
    return {field.name for field in _list_fields()}


def _list_fields() -> list[Field]:
    return [field for field in fields(TrainConfig) if get_origin(field.type) is list]


def _check_files(arguments: list[str]) -> None:
    """UsageError that names a `--config` file which is not what the parser expects."""
    pairs = pairwise([*arguments, ""])
    paths = [after for flag, after in pairs if flag == "--config"]
    paths += [flag.partition("=")[2] for flag in arguments if flag.startswith("--config=")]
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                content = yaml.load(file, _EachKeyOnce)  # a SafeLoader
        except OSError as error:
            raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split()).replace(f'in "{path}", ', "")
            raise UsageError(f"--config {path} is not YAML: {reason}") from None
        if not isinstance(content, dict):
            raise UsageError(f"--config {path} holds no options; write `name: value` lines")
        for field in _list_fields():
            _check_list(path, field, content.get(field.name, []))


def _check_list(path: str, field: Field, value: object) -> None:
    """UsageError where a file has something else than a list for this option."""
    of_data = get_args(field.type)[0] == str | dict[str, Any]
    kinds = (str | dict) if of_data else str
    if isinstance(value, list) and all(isinstance(one, kinds) for one in value):
        return
    form = "a line `- PATH` or `- path: PATH` for each source"
    if not of_data:
        form = f'`{field.name}: ["A", "B"]`, or [] for none'
    raise UsageError(f"--config {path}: {field.name} is to be a list, {form}")


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which no key may come twice; PyYAML takes the last value without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UsageError(
                        f"--config {key.start_mark.name}, line {key.start_mark.line + 1}: "
                        f"{key.value} is given a second time; keep one of them"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _explain(error: ArgumentError) -> str:
    """What is wrong in one line: a value with what it must be, a name with the nearest option."""
    message = " ".join(str(error).split())
    if value := re.match(r'Parser key "(\w+)".*?(?:Got|Given) value: (.*)', message):
        return _explain_value(*value.groups()) or message
    names = list(TrainConfig.__dataclass_fields__)
    words = [word.lstrip("-") for word in re.findall(r"[\w-]+", message)]
    if any(word in names for word in words):  # it is known, and has a wrong value
        return message
    for word in words:
        near = get_close_matches(word, names, 1, 0.75)
        if hint := HABITS.get(word) or (near and f"did you mean {near[0]}?"):
            return f"{message} ({hint})"
    return message


def _explain_value(name: str, value: str) -> str | None:
    """What an option must be instead of this value; None where no few words say it."""
    option = TrainConfig.__dataclass_fields__.get(name)
    forms = [
        f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else FORMS.get(kind)
        for kind in (_kinds(option.type) if option else [None])
    ]
    return f"{name} is {value}; it must be {', or '.join(forms)}" if all(forms) else None

"""The command line of train/sft.py: defaults, YAML and flags become one `TrainConfig`.

An unknown or mistyped key is an error that suggests the nearest one, never ignored.
"""

import re
import sys
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import Any, get_args, get_origin

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentError, ArgumentParser

from train.config import TrainConfig, UsageError
from train.optim import SCHEDULES
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
    config = TrainConfig(**options)
    if config.lr_scheduler_type not in SCHEDULES:
        names = ", ".join(SCHEDULES)
        raise UsageError(
            f"lr_scheduler_type is {config.lr_scheduler_type}; it must be one of {names}"
        )
    return config


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
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
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

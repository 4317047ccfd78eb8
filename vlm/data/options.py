"""What the commands of `vlm.data` are told: the data, the model that it is for, and limits."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

from vlm.checkpoint import CheckpointError
from vlm.data.chat import Think
from vlm.data.limits import Limits, environment_limits
from vlm.data.processor import Processor, Truncation
from vlm.data.sources import DataError, Place, Source, open_sources
from vlm.data.watch import DataWorkerError
from vlm.hf_config import ConfigError
from vlm.hub import add_hub_argument, resolve_model


def data_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A command's parser with what all of them take; flags and defaults are training's."""
    parser = argparse.ArgumentParser(
        prog=f"python -m vlm.data.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", nargs="+", help="files, directories or hub ids; PATH#N: N rows")
    parser.add_argument("--model", required=True, help="directory or hub id of the model")
    add_hub_argument(parser)
    parser.add_argument("--media_root", type=Path, help="what paths of media are relative to")
    parser.add_argument("--allow_urls", action="store_true", help="download media given as URLs")
    parser.add_argument("--max_length", type=int, default=8192, help="tokens of a sample")
    parser.add_argument("--truncation", choices=get_args(Truncation), default="delete")
    parser.add_argument("--think", choices=get_args(Think), default="keep")
    for limit, kind in (
        ("min_pixels", int),
        ("max_pixels", int),
        ("video_max_pixels", int),
        ("fps", float),
        ("fps_max_frames", int),
    ):
        parser.add_argument(f"--{limit}", type=kind, default=getattr(Limits, limit))
    parser.set_defaults(**environment_limits())
    return parser


def open_data(options: argparse.Namespace) -> tuple[tuple[Source, ...], Processor]:
    """The sources and the model's processor.

    Raises:
        DataError, ConfigError, CheckpointError, ValueError: one sentence about what is wrong.
    """
    if options.max_length < 1:
        raise ValueError(f"max_length is {options.max_length}; it must be above 0")
    model = resolve_model(options.model, options.hub)
    processor = Processor.from_pretrained(
        model,
        Limits.of(options),
        max_length=options.max_length,
        truncation=options.truncation,
        think=options.think,
    )
    sources = open_sources(
        options.data,
        media_root=options.media_root,
        hub=options.hub,
        allow_urls=options.allow_urls,
    )
    return sources, processor


def exit_code(work: Callable[[], int], interrupted: str) -> int:
    """Run a command: the exit code that `work` returns, or that of what it was stopped by.

    2 for a mistake in what was asked for, 1 for a data worker that died, 130 for Ctrl-C; each is
    told in one sentence, the last in the one given.
    """
    try:
        return work()
    except (ConfigError, CheckpointError, DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DataWorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def rows_of(sources: tuple[Source, ...]) -> Iterator[tuple[Source, object, Place]]:
    """Every row of all sources, in order, unparsed."""
    for source in sources:
        for chunk in source.chunks():
            for row, place in zip(chunk.rows, chunk.places, strict=True):
                yield source, row, place

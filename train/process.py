"""The process around the loop: its command line, its rank among the others, its exit code."""

import os
import sys
import time
from collections.abc import Callable

from train.command_line import parse
from train.config import TrainConfig, UsageError
from train.state import RunError
from train.world import LAUNCH, World
from vlm.checkpoint import CheckpointError
from vlm.data.ledger import TooManyBadSamples
from vlm.data.sources import DataError
from vlm.data.watch import DataWorkerError
from vlm.hf_config import ConfigError

MISTAKES = (UsageError, ConfigError, CheckpointError, DataError, TooManyBadSamples)
"""What was asked for cannot be done."""
PATIENCE = 30
"""Seconds within which the first rank of a machine has read the command line too."""


def run_process(train: Callable[[TrainConfig, World], None]) -> int:
    """Train as the command line says, and return the exit code.

    0: all that was asked for, or saved on a signal; 2: a mistake in what was asked for; 1: what
    went wrong later; 130: Ctrl-C. All but 0 are told in one sentence.
    """
    world = None
    try:
        config = parse()
        world = World.start(config.deterministic, config.ddp_timeout)
        train(config, world)
        return 0
    except (*MISTAKES, RunError, DataWorkerError) as error:
        if world is None and not _tells(world):
            # the launcher ends this rank once the first has told it; an earlier exit would end
            # the first one before it does
            time.sleep(PATIENCE)
        # known to every rank, but for the last, where the launcher ends the others
        if world is None or world.first or isinstance(error, DataWorkerError):
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, MISTAKES) else 1
    except KeyboardInterrupt:
        if _tells(world):
            print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if world is not None:
            world.leave_if_rank_lost(error)
        raise
    finally:
        if world is not None:
            world.stop()


def _tells(world: World | None) -> bool:
    """Whether this rank speaks for the others; before they have met, for those of its machine."""
    if world is not None:
        return world.first
    return not os.environ.keys() >= LAUNCH or os.environ.get("LOCAL_RANK", "0") == "0"

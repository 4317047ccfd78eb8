"""Runs one after another on the same ranks, each from its own YAML file: a script for torchrun
that pays for its start once. One with `deepspeed: null` is a plain one, on the first rank alone.

Beside its checkpoints each leaves `reads.json`: the reads of the device that Reads has counted.
In a run whose name begins with "refused" the last rank once gets infinite losses, though their
gradient is finite.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

import train.sft
from bench.reads import Reads
from train.command_line import parse
from train.world import World


@contextmanager
def infinite_losses() -> Iterator[None]:
    honest, calls = train.sft.cross_entropy, []

    def sometimes(*args):
        loss = honest(*args)
        calls.append(loss)
        return loss._replace(terms=loss.terms / (0.0 if len(calls) == 2 else 1.0))

    train.sft.cross_entropy = sometimes
    yield
    train.sft.cross_entropy = honest


world = World.start()
plain = World(0, 1, torch.device("cpu"), launched=False)
for path in sys.argv[1:]:
    config = parse(["--config", path])
    refused = config.output_dir.name.startswith("refused") and world.rank == world.size - 1
    with Reads() as reads, infinite_losses() if refused else nullcontext():
        if config.deepspeed:
            train.sft.train(config, world)
        else:
            world.from_first(lambda config=config: train.sft.train(config, plain))
    if world.first:
        counted = {"steps": reads.steps, "micro_steps": reads.micro_steps}
        (config.output_dir / "reads.json").write_text(json.dumps(counted))
world.stop()

"""Supervised fine-tuning of the hybrid: the whole loop, read from top to bottom.

    torchrun --nproc_per_node 8 train/sft.py --config configs/stage1.yaml \
        --model DIR --dataset data.jsonl --output_dir runs/stage1
    python train/sft.py ...                      # the same on one process, without DeepSpeed

The same command again resumes the run, exactly, on any number of ranks. Exit code 2 is a
mistake in what was asked for, told in one sentence.
"""

import math
import sys
import time
from pathlib import Path

import torch

from train.command_line import parse
from train.config import TrainConfig, UsageError
from train.data import open_data
from train.engine import check_engine, start_engine
from train.freeze import banner, freeze, trained_parts
from train.metrics import Log, Window, introduction
from train.optim import learning_rate_scale, set_learning_rate
from train.state import Run, restore_engine
from train.world import World
from vlm.checkpoint import CheckpointError, load_model
from vlm.data.ledger import TooManyBadSamples
from vlm.data.limits import Limits
from vlm.data.loader import open_loader
from vlm.data.processor import Processor
from vlm.data.sources import DataError
from vlm.data.watch import DataWorkerError
from vlm.hf_config import ConfigError
from vlm.hub import resolve_model
from vlm.loss import cross_entropy

REFUSED_IN_A_ROW = 3
"""So many steps with a loss or gradient that is not finite end the run."""


def train(config: TrainConfig, world: World) -> None:
    # ---- the run, and where it stands
    check_engine(config, world)
    run = Run(config, world)
    found = run.latest()
    torch.manual_seed(config.seed + world.rank)
    model_dir = found[0] / "model" if found else _given_model(config, world)

    # ---- data, and the plan that follows from its measures
    processor = Processor.from_pretrained(
        model_dir,
        Limits.of(config),
        max_length=config.max_length,
        truncation=config.truncation,
        think=config.think,
    )
    data = open_data(config, world, run, processor, trained_parts(config), found and found[1])
    dataset, progress, total_steps = data.dataset, data.progress, data.total_steps

    # ---- model and engine
    model = load_model(model_dir, getattr(torch, config.dtype), world.device).train()
    groups = freeze(model, config)
    model.set_recompute("full" if config.gradient_checkpointing else "none")
    log = Log(run.log, progress.step, total_steps, enabled=world.first)
    log.say(f"model {model_dir}")  # a hub's revision is in it, for a run that started from there
    log.say(introduction(config, world, progress, data.good, data.bad, total_steps))
    log.say(banner(model, groups))
    for text in data.about:
        log.say(text)
    _warm_up(model, dataset, world)  # memory fails here or never, but for a stream
    workers, timeout = config.dataloader_num_workers, config.dataloader_timeout
    on_cuda = world.device.type == "cuda"
    with open_loader(dataset, progress.position, workers, on_cuda, timeout) as steps:
        engine = start_engine(model, groups, config, world)
        if found:
            restore_engine(found[0], engine, progress.updates, world.rank)

        # ---- the loop: one turn is one optimiser step
        window, refused = Window(dataset.sources), 0
        for step in range(progress.step + 1, total_steps + 1):
            waiting = time.perf_counter()
            part = next(steps)  # this rank's micro-batches, all of them
            waiting = time.perf_counter() - waiting

            # What only this rank knows becomes known to all: how many targets its samples really
            # have (one may have turned out bad), and which were bad.
            world.check_in()
            own = [part.targets, part.tokens, part.samples, part.flops]
            own += [len(part.bad), part.window, *part.targets_by_source]
            targets, tokens, samples, flops, broken, windows, *seen = world.sum(own)
            data.account(step, part, broken, windows)

            if targets == 0:
                log.write("skipped", step, reason="no targets", samples=world.gather(part.ids))
            else:
                # of losses per source, and of answers that are right
                sums = torch.zeros(len(seen) + 1, dtype=torch.float64, device=world.device)
                for micro_batch in part.micro_batches:
                    batch = micro_batch.to(world.device, non_blocking=True)
                    hidden = model(batch)  # (N, D) at the target rows
                    loss, losses, right = cross_entropy(
                        hidden, model.head_weight, batch.targets, batch.weights
                    )
                    # of the global batch: packing and ranks change nothing
                    engine.backward(loss / targets)
                    sums.index_add_(0, batch.sources, losses.double())
                    sums[-1] += right.sum()

                scale = learning_rate_scale(engine.updates, total_steps, config)
                set_learning_rate(engine.param_groups, scale)
                sums, norm = engine.step(sums)
                _right = sums.pop()
                loss = sum(sums) / max(sum(seen), 1)
                if math.isfinite(norm) and math.isfinite(loss):
                    refused = 0
                    window.add(loss, norm, [targets, tokens, samples, flops], sums, seen, waiting)
                else:
                    refused += 1
                    ids = world.gather(part.ids)
                    log.write("refused", step, loss=str(loss), grad_norm=str(norm), samples=ids)
                    log.say(f"step {step} refused: loss {loss}, gradient norm {norm}; {ids}")
                    if refused == REFUSED_IN_A_ROW:
                        raise RuntimeError(f"{refused} steps refused in a row; see {run.log}")

            progress = progress.at(part.next, step, engine.updates)
            last = step == total_steps
            if window.steps and (last or step % config.logging_steps == 0):
                figures = window.figures()
                rates = {group["name"]: group["lr"] for group in engine.param_groups}
                log.write("train", step, epoch=part.position.epoch, **figures, lr=rates)
                log.show(step, f"loss {figures['loss']:.4f} norm {figures['grad_norm']:.2f}")
                window = Window(dataset.sources)
            if last or step % config.save_steps == 0:
                run.save(model, engine, progress, model_dir)
    log.say(f"done: {run.dir}/{run.latest()[0].name}")
    log.close()


def _given_model(config: TrainConfig, world: World) -> Path:
    """Its directory; a hub's model is downloaded once on each machine."""
    return world.from_first_of_machine(lambda: resolve_model(config.model, config.hub))


def _warm_up(model, dataset, world: World) -> None:
    """Forward and backward of the costliest micro-batch; the result is thrown away."""
    batch = dataset.costliest().to(world.device)
    hidden = model(batch)
    loss = cross_entropy(hidden, model.head_weight, batch.targets, batch.weights).sum
    loss.backward()
    model.zero_grad(set_to_none=True)


def main() -> int:
    world = None
    try:
        config = parse()
        world = World.start()
        train(config, world)
    except (UsageError, ConfigError, CheckpointError, DataError, TooManyBadSamples) as error:
        if world is None or world.first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except DataWorkerError as error:  # known to one rank alone; the launcher ends the others
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if world is None or world.first:
            print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if world is not None:
            world.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

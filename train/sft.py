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
from dataclasses import replace
from pathlib import Path

import torch

from train.config import TrainConfig, UsageError, parse
from train.engine import check_engine, start_engine
from train.freeze import banner, freeze, trained_parts
from train.metrics import Log, Window, introduction
from train.optim import learning_rate_scale, set_learning_rate
from train.state import Run, restore_engine
from train.world import World
from vlm.checkpoint import CheckpointError, load_model
from vlm.data.index import Index, build_index
from vlm.data.index_cache import default_cache_dir
from vlm.data.index_report import index_report
from vlm.data.ledger import Entry, Ledger, TooManyBadSamples
from vlm.data.limits import Limits
from vlm.data.loader import StepDataset, make_plan, open_loader
from vlm.data.plan_report import report
from vlm.data.processor import Processor
from vlm.data.sources import DataError, Source, open_sources
from vlm.data.stream import Stream, StreamDataset, open_stream
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

    # ---- data: measured once, by the first rank; the plan follows from the measures
    processor = Processor.from_pretrained(
        model_dir,
        Limits.of(config),
        max_length=config.max_length,
        truncation=config.truncation,
        think=config.think,
    )
    trains = trained_parts(config)
    skips_text = config.skip_text_only and "llm" not in trains
    ledger = Ledger(run.ledger, writes=world.first, strict=config.on_bad == "error")
    if config.streaming:
        stream = _open_stream(config, world)
        bad, good, data = [], 0, stream.fingerprint(processor, config.stream_window)
    else:
        index, bad = _measure(config, world, processor)
        good, data = len(index), index.fingerprint()
        ledger.record(bad)
        ledger.check(good + len(bad), config.max_bad_fraction)
    progress = found[1] if found else run.begin(good, data)
    run.check(progress, good, data)
    if config.streaming:
        shape = (progress.global_batch_size, config.stream_window, config.seed, world.rank)
        limits = (world.size, config.budget, skips_text)
        dataset = StreamDataset(stream, processor, trains, *shape, *limits)
        total_steps = config.max_steps
        about = [f"stream: {len(stream.shards):,} shards, windows of {config.stream_window} steps"]
    else:
        costs = index.costs(processor.config, trains)
        fixed = (progress.global_batch_size, config.seed, world.size)
        plan = make_plan(index, costs, *fixed, config.budget, skips_text)
        dataset = StepDataset(index, processor, plan, world.rank)
        total_steps = config.max_steps or plan.steps_per_epoch * config.num_train_epochs
        about = [index_report(index, bad), report(plan, most_steps=20).line()] * world.first

    # ---- model and engine
    model = load_model(model_dir, getattr(torch, config.dtype), world.device).train()
    groups = freeze(model, config)
    model.set_recompute("full" if config.gradient_checkpointing else "none")
    log = Log(run.log, progress.step, total_steps, enabled=world.first)
    log.say(f"model {model_dir}")  # a hub's revision is in it, for a run that started from there
    log.say(introduction(config, world, progress, good, len(bad), total_steps))
    log.say(banner(model, groups))
    for text in about:
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
            if config.streaming and len(set(world.gather([part.window]))) > 1:
                raise DataError(
                    "the ranks read different samples of the stream; can each of them read all?"
                )
            own = [part.targets, part.tokens, part.samples, part.flops, len(part.bad)]
            targets, *counts = world.sum(own + part.targets_by_source)
            broken, seen = counts[3], counts[4:]
            if broken:
                ledger.record(world.gather(part.bad))
                # of a stream: those read so far, about
                read = good or (step + config.stream_window) * progress.global_batch_size
                ledger.check(read + len(bad), config.max_bad_fraction)

            if targets == 0:
                log.write("skipped", step, reason="no targets", samples=world.gather(part.ids))
            else:
                sums = torch.zeros(len(seen), dtype=torch.float64, device=world.device)
                for micro_batch in part.micro_batches:
                    batch = micro_batch.to(world.device, non_blocking=True)
                    hidden = model(batch)  # (N, D) at the target rows
                    loss, losses = cross_entropy(
                        hidden, model.head_weight, batch.targets, batch.weights
                    )
                    # of the global batch: packing and ranks change nothing
                    engine.backward(loss / targets)
                    sums.index_add_(0, batch.sources, losses.double())

                scale = learning_rate_scale(engine.updates, total_steps, config)
                set_learning_rate(engine.param_groups, scale)
                sums, norm = engine.step(sums)
                loss = sum(sums) / max(sum(seen), 1)
                if math.isfinite(norm) and math.isfinite(loss):
                    refused = 0
                    window.add(loss, norm, [targets, *counts[:3]], sums, seen, waiting)
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


def _measure(config: TrainConfig, world: World, processor: Processor) -> tuple[Index, list[Entry]]:
    """The index, and the bad samples, by the first rank's work."""
    sources = _open_sources(config, world)

    def measure() -> tuple[Index, list[Entry]]:
        workers, folder = config.dataset_num_proc, default_cache_dir()
        index, bad = build_index(sources, processor, workers, folder)
        return replace(index, sources=()), bad  # every rank has opened its own

    index, bad = world.from_first(measure)
    return replace(index, sources=sources), bad


def _open_stream(config: TrainConfig, world: World) -> Stream:
    """The shards, as the first rank finds them."""

    def find() -> Stream:
        root, urls = config.media_root, config.allow_urls
        return open_stream(config.dataset, media_root=root, allow_urls=urls)

    return world.from_first(find)


def _open_sources(config: TrainConfig, world: World) -> tuple[Source, ...]:
    """The data; what a hub has is downloaded once on each machine."""

    def opened() -> tuple[Source, ...]:
        return open_sources(
            config.dataset,
            media_root=config.media_root,
            hub=config.hub,
            allow_urls=config.allow_urls,
        )

    world.from_first_of_machine(lambda: len(opened()))  # a source itself may not travel
    return opened()


def _warm_up(model, dataset: StepDataset | StreamDataset, world: World) -> None:
    """Forward and backward of the costliest micro-batch; the result is thrown away."""
    batch = dataset.costliest().to(world.device)
    hidden = model(batch)
    loss, _ = cross_entropy(hidden, model.head_weight, batch.targets, batch.weights)
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

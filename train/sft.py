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
from functools import partial

import torch

from train.config import TrainConfig, UsageError, parse
from train.engine import check_engine, start_engine
from train.freeze import banner, freeze, trained_parts
from train.metrics import Log, Window
from train.optim import learning_rate_scale, set_learning_rate
from train.state import Progress, Run, restore_engine
from train.world import World
from vlm.checkpoint import CheckpointError, load_model
from vlm.cost import sample_flops
from vlm.data.index import DataError, build_index
from vlm.data.ledger import Ledger, TooManyBadSamples
from vlm.data.limits import ENVIRONMENT, Limits, environment_limits
from vlm.data.loader import StepDataset, make_loader
from vlm.data.plan import batches_per_epoch
from vlm.data.processor import Processor
from vlm.hf_config import ConfigError
from vlm.loss import cross_entropy_sum

REFUSED_IN_A_ROW = 3
"""So many steps with a loss or gradient that is not finite end the run."""


def train(config: TrainConfig, world: World) -> None:
    # ---- the run, and where it stands
    check_engine(config, world)
    run = Run(config, world)
    found = run.latest()
    torch.manual_seed(config.seed + world.rank)
    model_dir = found[0] / "model" if found else config.model

    # ---- data: measured once, by the first rank; the plan follows from the measures
    processor = Processor.from_pretrained(
        model_dir,
        Limits.of(config),
        max_length=config.max_length,
        truncation=config.truncation,
    )
    cost = partial(_cost, processor.config, trained_parts(config))
    index, bad = world.from_first(
        lambda: build_index(config.dataset, processor, cost, config.dataset_num_proc)
    )
    samples = len(index) + len(bad)
    ledger = Ledger(run.ledger, writes=world.first)
    ledger.record(bad)
    ledger.check(samples, config.max_bad_fraction)
    progress = found[1] if found else _fresh_progress(config, world, index)
    if (progress.samples, progress.data) != (len(index), index.fingerprint()):
        raise UsageError(f"the data differs from what {run.dir} was started with; use another dir")
    size = config.global_batch_size or progress.global_batch_size
    if (progress.seed, progress.global_batch_size) != (config.seed, size):
        raise UsageError(
            f"{run.dir} was started with seed {progress.seed} and global_batch_size "
            f"{progress.global_batch_size}, which fix its batches; keep them or use another dir"
        )
    steps_per_epoch = batches_per_epoch(len(index), progress.global_batch_size)
    total_steps = config.max_steps or steps_per_epoch * config.num_train_epochs
    micro_batch = config.per_device_train_batch_size
    plan = (progress.global_batch_size, micro_batch, config.seed, world.rank, world.size)
    dataset = StepDataset(index, processor, *plan)

    # ---- model and engine
    model = load_model(model_dir, getattr(torch, config.dtype), world.device).train()
    groups = freeze(model, config)
    model.set_recompute("full" if config.gradient_checkpointing else "none")
    log = Log(run.log, progress.step, total_steps, enabled=world.first)
    log.say(_introduction(config, world, progress, len(index), len(bad), total_steps))
    log.say(banner(model, groups))
    _warm_up(model, dataset, world)  # memory fails here or never
    steps = iter(
        make_loader(dataset, progress.position, config.dataloader_num_workers, _cuda(world))
    )
    engine = start_engine(model, groups, config, world)
    if found:
        restore_engine(found[0], engine, progress.updates, world.rank)

    # ---- the loop: one turn is one optimiser step
    window, refused = Window(), 0
    for step in range(progress.step + 1, total_steps + 1):
        waiting = time.perf_counter()
        part = next(steps)  # this rank's micro-batches, all of them
        waiting = time.perf_counter() - waiting

        # What only this rank knows becomes known to all: how many targets its samples really
        # have (one may have turned out bad), and which were bad.
        world.check_in()
        counts = world.sum([part.targets, part.tokens, part.samples, part.flops, len(part.bad)])
        targets, broken = counts[0], counts.pop()
        if broken:
            ledger.record(world.gather(part.bad))
            ledger.check(samples, config.max_bad_fraction)

        if targets == 0:
            log.write("skipped", step, reason="no targets", samples=world.gather(part.ids))
        else:
            loss_sum = torch.zeros((), device=world.device)
            for micro_batch in part.micro_batches:
                batch = micro_batch.to(world.device, non_blocking=True)
                hidden = model(batch)  # (N, D) at the target rows
                loss = cross_entropy_sum(hidden, model.head_weight, batch.targets, batch.weights)
                loss = loss / targets  # of the global batch: packing and ranks change nothing
                engine.backward(loss)
                loss_sum += loss.detach()

            scale = learning_rate_scale(engine.updates, total_steps, config)
            set_learning_rate(engine.param_groups, scale)
            (loss,) = world.sum([loss_sum.item()])
            norm = engine.step(loss)
            if math.isfinite(norm) and math.isfinite(loss):
                refused = 0
                window.add(loss, norm, counts, waiting)
            else:
                refused += 1
                ids = world.gather(part.ids)
                log.write("refused", step, loss=str(loss), grad_norm=str(norm), samples=ids)
                log.say(f"step {step} refused: loss {loss}, gradient norm {norm}; samples {ids}")
                if refused == REFUSED_IN_A_ROW:
                    raise RuntimeError(f"{refused} steps refused in a row; see {run.log}")

        progress = progress.after(part.position, steps_per_epoch, step, engine.updates)
        last = step == total_steps
        if window.steps and (last or step % config.logging_steps == 0):
            figures = window.figures()
            rates = {group["name"]: group["lr"] for group in engine.param_groups}
            log.write("train", step, epoch=part.position.epoch, **figures, lr=rates)
            log.show(step, f"loss {figures['loss']:.4f} norm {figures['grad_norm']:.2f}")
            window = Window()
        if last or step % config.save_steps == 0:
            run.save(model, engine, progress, model_dir)
    log.say(f"done: {run.dir}/{run.latest()[0].name}")
    log.close()


def _fresh_progress(config: TrainConfig, world: World, index) -> Progress:
    """Where a run begins. The size of its global batches is fixed here, for good."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    size = config.global_batch_size or per_step * world.size
    return Progress(0, 0, 0, 0, size, config.seed, len(index), index.fingerprint())


def _cost(model_config, trains, sizes) -> float:
    return sample_flops(model_config, sizes.length, sizes.grid_thw, sizes.targets, trains)


def _cuda(world: World) -> bool:
    return world.device.type == "cuda"


def _warm_up(model, dataset: StepDataset, world: World) -> None:
    """Forward and backward of the costliest micro-batch; the result is thrown away."""
    batch = dataset.costliest().to(world.device)
    hidden = model(batch)
    cross_entropy_sum(hidden, model.head_weight, batch.targets, batch.weights).backward()
    model.zero_grad(set_to_none=True)


def _introduction(config, world: World, progress, good: int, bad: int, total_steps: int) -> str:
    defaults = environment_limits().items()
    in_force = [option for option, value in defaults if getattr(config, option) == value]
    set_by = {v: o for v, o in ENVIRONMENT.items() if o in in_force}
    verb = "resuming" if progress.step else "starting"
    return (
        f"{verb} at step {progress.step} of {total_steps}: "
        f"{good} samples ({bad} bad), {progress.global_batch_size} a step, {world.size} ranks on "
        f"{world.device.type}, {config.dtype}, max_pixels {config.max_pixels}, video_max_pixels "
        f"{config.video_max_pixels}, fps {config.fps}, fps_max_frames {config.fps_max_frames}"
        + "".join(f" ({option} from {variable})" for variable, option in set_by.items())
    )


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
    finally:
        if world is not None:
            world.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Supervised fine-tuning of the hybrid: the whole loop, read from top to bottom.

    torchrun --nproc_per_node 8 train/sft.py --config configs/stage1.yaml \
        --model DIR --dataset data.jsonl --output_dir runs/stage1
    python train/sft.py ...                      # the same on one process, without DeepSpeed

The same command again resumes the run, exactly, on any number of ranks. Exit code 2 is a
mistake in what was asked for, told in one sentence.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from train.config import TrainConfig
from train.data import open_data, open_features, open_processor
from train.dry_run import dry_run, warm_up
from train.engine import check_engine, start_engine
from train.evaluate import Evaluator
from train.fragments import restore_engine
from train.freeze import banner, trained_parts
from train.metrics import Log, introduction, start_facts
from train.model import open_model
from train.optim import learning_rate_scale, set_learning_rate
from train.process import run_process
from train.profiling import Profiler
from train.report import summarise
from train.state import Run, RunError
from train.stop import END, Stop
from train.trackers import check_trackers
from train.window import Window
from train.world import World
from vlm.data.features import keeping
from vlm.data.loader import open_loader
from vlm.hub import resolve_model
from vlm.loss import cross_entropy

REFUSED_IN_A_ROW = 3
"""So many steps with a loss or gradient that is not finite end the run."""


def train(config: TrainConfig, world: World) -> None:
    # ---- the run, and where it stands
    check_engine(config, world)
    check_trackers(config)
    run = Run(config, world)
    found = run.latest()
    torch.manual_seed(config.seed + world.rank)
    model_dir = found[0] / "model" if found else _given_model(config, world)

    # ---- data, and the plan that follows from its measures
    processor = world.together(lambda: open_processor(config, model_dir))
    trains = trained_parts(config, processor.config)
    data = open_data(config, world, run, processor, trains, found and found[1])
    dataset, progress, total_steps = data.dataset, data.progress, data.total_steps

    # ---- model and engine
    model, groups = world.together(lambda: open_model(model_dir, config, world.device))
    run.check_start(model, groups, found)
    features, of_features = open_features(config, world, model.visual)
    about = [f"model {model_dir}"]  # a hub's revision is in it, for a run that started from there
    about += [introduction(config, world, data), banner(model, groups, config)]
    about += [*run.about, *data.about, *of_features]
    if config.dry_run:
        return dry_run(config, world, processor, data, model, trains, about)
    with run.writing():
        log = Log(config, world, progress.step, total_steps, start_facts(model, dataset))
    log.say("\n".join(about))
    warm_up(config, world, model, dataset, trains)  # memory fails here or never
    dataset = replace(dataset, features=features)
    evaluator = Evaluator(config, world, processor, data, run)
    if progress.step < total_steps:
        run.keep_options()
    workers, timeout = config.dataloader_num_workers, config.dataloader_timeout
    on_cuda = world.device.type == "cuda"
    with (
        Stop(config, run) as stop,
        run.training(log.write),
        open_loader(dataset, progress.position, workers, on_cuda, timeout) as steps,
        keeping(model.visual, features, int(config.feature_cache_gb * 1e9)),
        Profiler(run.dir / "profile", config.profile and world.first) as profiler,
    ):
        engine = start_engine(model, groups, config, world)
        if found:
            restore_engine(found[0], engine, progress.updates, world.rank)
        run.reserve(model, engine)
        evaluator.at(progress.step, model, log)

        # ---- the loop: one turn is one optimiser step
        window, refused = Window(dataset.sources, world), 0
        for step in range(progress.step + 1, total_steps + 1):
            last = step == total_steps
            with window.waiting("data"):
                part = next(steps)  # this rank's micro-batches, all of them

            # What only this rank knows becomes known to all: how many targets its samples really
            # have (one may have turned out bad), and which were bad.
            with window.waiting("ranks"):
                world.check_in()
            own = [part.targets, part.tokens, part.samples, part.flops]
            own += [len(part.bad), part.window, stop.wish(), *part.targets_by_source]
            targets, tokens, samples, flops, broken, windows, wish, *seen = world.sum(own)
            data.account(step, part, broken, windows)
            logs = last or wish > 0 or step % config.logging_steps == 0

            if targets == 0:
                log.write("skipped", step, reason="no targets", samples=world.gather(part.ids))
            else:
                # of losses per source, and of answers that are right
                sums = torch.zeros(len(seen) + 1, dtype=torch.float64, device=world.device)
                for micro_batch in part.micro_batches:
                    batch = micro_batch.to(world.device, non_blocking=True)
                    with window.forward():
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
                stepped = engine.step(sums, detail=logs)
                norm, loss = stepped.norm, sum(stepped.sums[:-1]) / max(sum(seen), 1)
                if math.isfinite(norm) and math.isfinite(loss):
                    refused = 0
                    window.add(stepped, [targets, tokens, samples, flops], seen)
                else:
                    refused += 1
                    ids = world.gather(part.ids)
                    log.write("refused", step, loss=str(loss), grad_norm=str(norm), samples=ids)
                    log.say(f"step {step} refused: loss {loss}, gradient norm {norm}; {ids}")
                    if refused == REFUSED_IN_A_ROW:
                        raise RunError(f"{refused} steps refused in a row; see {run.log}")

            progress = progress.at(part.next, step, engine.updates)
            if logs and window.steps:
                log.train(step, part.position.epoch, window.figures(engine))
                window = Window(dataset.sources, world)
            with window.waiting("eval"):
                evaluator.at(step, model, log, last)
            if last or wish or step % config.save_steps == 0:
                with window.waiting("save"):
                    run.save(model, engine, progress, model_dir)
            profiler.step()
            if wish >= END:
                break
    log.end(progress.step, run.checkpoints()[-1])
    if world.first:
        summarise(run.dir)


def _given_model(config: TrainConfig, world: World) -> Path:
    """Its directory; a hub's model is downloaded once on each machine."""
    return world.from_first_of_machine(lambda: resolve_model(config.model, config.hub))


def main() -> int:
    return run_process(train)


if __name__ == "__main__":
    sys.exit(main())

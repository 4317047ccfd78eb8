"""The run's data: indexed or streamed, the plan that follows from it, and its bad samples; and what
is held out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from train.config import TrainConfig, UsageError
from train.state import Progress, Run
from train.world import World
from vlm.data.index import Index, build_index
from vlm.data.index_cache import default_cache_dir
from vlm.data.index_report import index_report
from vlm.data.ledger import Entry, Ledger
from vlm.data.limits import Limits
from vlm.data.loader import Step, StepDataset, make_plan
from vlm.data.plan_report import report
from vlm.data.processor import Processor
from vlm.data.sources import DataError, Source, open_sources
from vlm.data.split import choose_held_out, related
from vlm.data.stream import Stream, StreamDataset, open_stream


@dataclass(frozen=True)
class TrainData:
    """What the loop takes its steps from."""

    dataset: StepDataset | StreamDataset
    progress: Progress
    """Where the run stands."""
    total_steps: int
    good: int
    """Samples; 0 of a stream, whose number nobody knows."""
    bad: int
    about: list[str]
    """For the person who watches."""
    ledger: Ledger
    config: TrainConfig
    world: World
    held_out: Index | None
    """Samples that are never trained on."""
    text_probe: Index | None
    """Texts that a loss is taken on."""

    def account(self, step: int, part: Step, broken: float, windows: float) -> None:
        """Record what the ranks found out in a step; every rank calls this.

        Args:
            broken: bad samples on all ranks; windows: sum of `part.window` over them.

        Raises:
            DataError: the ranks read different samples of a stream.
            TooManyBadSamples: as the ledger has it.
        """
        if windows != part.window * self.world.size:
            raise DataError(
                "the ranks read different samples of the stream; can each of them read all?"
            )
        if broken:
            self.ledger.record(self.world.gather(part.bad))
            # of a stream: those read so far, about
            ahead = (step + self.config.stream_window) * self.progress.global_batch_size
            samples = (self.good or ahead) + self.bad
            self.ledger.check(samples, self.config.max_bad_fraction)


def open_processor(config: TrainConfig, model_dir: Path) -> Processor:
    """A model's processor, with the run's limits."""
    return Processor.from_pretrained(
        model_dir,
        Limits.of(config),
        max_length=config.max_length,
        truncation=config.truncation,
        think=config.think,
    )


def open_data(
    config: TrainConfig,
    world: World,
    run: Run,
    processor: Processor,
    trains: frozenset[str],
    resumed: Progress | None,
) -> TrainData:
    """Measured once, by the first rank; the plan follows from the measures.

    Args:
        trains: parts of the model; where the language model is frozen, text alone teaches nothing.

    Raises:
        DataError, UsageError, TooManyBadSamples: one sentence.
    """
    ledger = Ledger(run.ledger, writes=world.first, strict=config.on_bad == "error")
    skips_text = config.skip_text_only and "llm" not in trains
    held_out, bad = _measure(config.val_dataset, config, world, processor)
    text_probe, broken = _measure(config.text_probe, config, world, processor)
    bad += broken
    if config.streaming:
        ledger.record(bad)
        stream = world.from_first(lambda: _find_stream(config))
        data = stream.fingerprint(processor, config.stream_window)
        progress = resumed or run.begin(0, data)
        run.check(progress, 0, data)
        shape = (progress.global_batch_size, config.stream_window, config.seed, world.rank)
        limits = (world.size, config.budget, skips_text)
        dataset = StreamDataset(stream, processor, trains, *shape, *limits)
        about = [f"stream: {len(stream.shards):,} shards, windows of {config.stream_window} steps"]
        good, steps = 0, config.max_steps
    else:
        index, broken = _measure(config.dataset, config, world, processor)
        about = [index_report(index, broken)] * world.first
        bad += broken
        ledger.record(bad)
        ledger.check(len(index) + len(bad), config.max_bad_fraction)
        if config.split_dataset_ratio:
            index, held_out = _split(index, config, world)
        progress = resumed or run.begin(len(index), index.fingerprint())
        run.check(progress, len(index), index.fingerprint())
        costs = index.costs(processor.config, trains)
        fixed = (progress.global_batch_size, config.seed, world.size)
        plan = make_plan(index, costs, *fixed, config.budget, skips_text)
        dataset = StepDataset(index, processor, plan, world.rank)
        good, steps = len(index), config.max_steps or plan.steps_per_epoch * config.num_train_epochs
        about += [report(plan, most_steps=20).line()] * world.first
    if held_out:
        about.append(
            f"held out: {len(held_out):,} samples, {(held_out.media > 0).sum():,} of them "
            "with images or videos"
        )
    rest = (ledger, config, world, held_out, text_probe)
    return TrainData(dataset, progress, steps, good, len(bad), about, *rest)


Specs = Sequence[str | dict[str, Any]]


def _measure(
    specs: Specs, config: TrainConfig, world: World, processor: Processor
) -> tuple[Index | None, list[Entry]]:
    """The index of some data, and its bad samples, by the first rank's work; None of no data."""
    if not specs:
        return None, []
    sources = _open_sources(specs, config, world)

    def measure() -> tuple[Index, list[Entry]]:
        workers, folder = config.dataset_num_proc, default_cache_dir()
        index, bad = build_index(sources, processor, workers, folder)
        return replace(index, sources=()), bad  # every rank has opened its own

    index, bad = world.from_first(measure)
    return replace(index, sources=sources), bad


def _split(index: Index, config: TrainConfig, world: World) -> tuple[Index, Index]:
    """What is trained on, and what is held out; the first rank reads all samples for it."""

    def choose() -> np.ndarray:
        groups = related(map(index.sample, range(len(index))))
        return choose_held_out(groups, index.source, config.split_dataset_ratio, config.seed)

    chosen = world.from_first(choose)
    if not len(chosen):
        raise UsageError(
            f"split_dataset_ratio {config.split_dataset_ratio:g} of {len(index)} samples holds "
            "none out (those that share an image stay together); raise it or give val_dataset"
        )
    others = np.setdiff1d(np.arange(len(index)), chosen)
    return index.select(others), index.select(chosen)


def _open_sources(specs: Specs, config: TrainConfig, world: World) -> tuple[Source, ...]:
    """The data; what a hub has is downloaded once on each machine."""

    def opened() -> tuple[Source, ...]:
        return open_sources(
            specs,
            media_root=config.media_root,
            hub=config.hub,
            allow_urls=config.allow_urls,
        )

    world.from_first_of_machine(lambda: len(opened()))  # a source itself may not travel
    return opened()


def _find_stream(config: TrainConfig) -> Stream:
    return open_stream(config.dataset, media_root=config.media_root, allow_urls=config.allow_urls)

"""The run's data: indexed or streamed, the plan that follows from it, and its bad samples; and what
is held out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from train.budget import budget_of
from train.config import TrainConfig, UsageError
from train.state import Progress, Run
from train.world import World
from vlm.config import VLMConfig
from vlm.cost import vision_flops
from vlm.cost.report import SIZES
from vlm.data.features import FeatureCache, bytes_in, measure
from vlm.data.index import Index, build_index
from vlm.data.index_cache import default_cache_dir
from vlm.data.index_report import index_report
from vlm.data.ledger import EVALUATION, Entry, Ledger
from vlm.data.limits import Limits
from vlm.data.loader import Step, StepDataset, make_plan
from vlm.data.plan_report import report
from vlm.data.processor import Processor
from vlm.data.sources import DataError, Source, open_sources
from vlm.data.split import choose_held_out, related
from vlm.data.stream import Stream, StreamDataset, open_stream
from vlm.vision import VisionTower


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
    if config.feature_cache and "vit" in trains:
        raise UsageError("feature_cache needs a frozen ViT; set freeze_vit, or leave it out")
    ledger = Ledger(run.ledger, world.first and not config.dry_run, strict=config.on_bad == "error")
    skips_text = config.skip_text_only and "llm" not in trains
    held_out = _measure_held_out("val_dataset", config, world, processor, ledger)
    text_probe = _measure_held_out("text_probe", config, world, processor, ledger)
    bad: list[Entry] = []
    choose = partial(budget_of, config, world, run, processor.config, trains, resumes=bool(resumed))
    if config.streaming:
        stream = world.from_first(lambda: _find_stream(config))
        data = stream.fingerprint(processor, config.stream_window)
        progress = resumed or run.begin(0, data)
        run.check(progress, 0, data)
        per_token = config.patch_budget / config.token_budget
        budget, budgets = choose(
            global_batch_size=progress.global_batch_size,
            lengths=np.array([config.max_length]),
            patches=np.array([int(config.max_length * per_token)]),
        )
        dataset = StreamDataset(
            stream,
            processor,
            trains,
            global_batch_size=progress.global_batch_size,
            window=config.stream_window,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            budget=budget,
            skips_text=skips_text,
        )
        about = [f"stream: {len(stream.shards):,} shards, windows of {config.stream_window} steps"]
        good, steps = 0, config.max_steps
    else:
        index, bad = _measure(config.dataset, config, world, processor)
        about = [index_report(index, bad)] * world.first
        ledger.record(bad)
        ledger.check(len(index) + len(bad), config.max_bad_fraction)
        if config.split_dataset_ratio:
            index, held_out = _split(index, config, world)
        progress = resumed or run.begin(len(index), index.fingerprint())
        run.check(progress, len(index), index.fingerprint())
        costs = index.costs(processor.config, trains)
        kept = index.patches > 0 if skips_text and index.patches.any() else slice(None)
        budget, budgets = choose(
            global_batch_size=progress.global_batch_size,
            lengths=index.length[kept],
            patches=index.patches[kept],
        )
        plan = make_plan(
            index,
            costs,
            global_batch_size=progress.global_batch_size,
            seed=config.seed,
            world=world.size,
            budget=budget,
            skips_text=skips_text,
            later_costs=later_costs(index, costs, config, processor.config, trains),
        )
        dataset = StepDataset(index, processor, plan, world.rank)
        good, steps = len(index), config.max_steps or plan.steps_per_epoch * config.num_train_epochs
        about += [report(plan, most_steps=20).line()] * world.first
    about += budgets * world.first
    if held_out:
        about.append(
            f"held out: {len(held_out):,} samples, {(held_out.media > 0).sum():,} of them "
            "with images or videos"
        )
    return TrainData(
        dataset,
        progress,
        total_steps=steps,
        good=good,
        bad=len(bad),
        about=about,
        ledger=ledger,
        config=config,
        world=world,
        held_out=held_out,
        text_probe=text_probe,
    )


def later_costs(
    index: Index,
    costs: np.ndarray,
    config: TrainConfig,
    model: VLMConfig,
    trains: frozenset[str],
) -> np.ndarray | None:
    """(n,) FLOPs of the samples once the feature cache is filled; None without one.

    The frozen ViT's count for the share of the data that the cache has no room for. Which samples
    that will be is unknown, since the plan follows from config and data and not from the disk.

    Args: costs: (n,) useful FLOPs.
    """
    if not config.feature_cache:
        return None
    grids = index.grids.astype(np.int64)
    flops = vision_flops(model.vision, *grids.T, trains)["vision tower"]
    owners = np.repeat(np.arange(len(index)), index.media)
    needed = int(grids.prod(axis=1).sum()) * model.vision.hidden_size * SIZES[config.dtype]
    share = min(1.0, config.feature_cache_gb * 1e9 / max(1, needed))
    return costs - share * np.bincount(owners, flops, len(index))


def open_features(
    config: TrainConfig, world: World, tower: VisionTower
) -> tuple[FeatureCache | None, list[str]]:
    """The cache of a frozen tower's output, and a line about it; none where none is asked for.
    A dry run looks at the folder alone, and opens none.

    Raises UsageError where the folder cannot be used.
    """
    if not config.feature_cache:
        return None, []

    root = config.feature_cache.absolute()

    def opened() -> tuple[FeatureCache | None, int]:
        try:
            if config.dry_run:
                return None, bytes_in(root)
            return FeatureCache.of(root, tower, config.compile), measure(root)
        except OSError as error:
            raise UsageError(f"feature_cache: {config.feature_cache}: {error.strerror}") from None

    cache, used = world.from_first_of_machine(opened)
    room = f"{used / 1e9:.3g} of {config.feature_cache_gb:g} GB used"
    return cache, [f"feature cache: {root}, {room}"]


Specs = Sequence[str | dict[str, Any]]


def _measure_held_out(
    option: str, config: TrainConfig, world: World, processor: Processor, ledger: Ledger
) -> Index | None:
    """The index of an option's data, its bad samples recorded; None of no data."""
    if not (specs := getattr(config, option)):
        return None
    index, bad = _measure(specs, config, world, processor)
    ledger.record([replace(entry, found=EVALUATION) for entry in bad])
    return index


def _measure(
    specs: Specs, config: TrainConfig, world: World, processor: Processor
) -> tuple[Index, list[Entry]]:
    """The index of some data, and its bad samples, by the first rank's work."""
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

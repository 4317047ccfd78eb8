"""The run on disk: directory, checkpoints, exact resume on any number of ranks.

    output_dir/
      config.yaml log.jsonl ledger.jsonl latest
      checkpoint-<step>/
        model/                        the hub's layout, loadable as it is
        engine/rank-*.safetensors     each rank's own fragments of masters and moments
        trainer.json                  step, place in the plan, updates

A fragment is named `parameter|kind|start`, so that any number of ranks can read what it needs
without conversion, communication or pickle. A checkpoint is written beside its final name and
renamed: it is whole or absent.
"""

import json
import os
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from train.config import TrainConfig, UsageError
from train.engine import Engine, Fragment
from train.world import World
from vlm.checkpoint import save_model, write_json
from vlm.data.plan import Position
from vlm.model import VisionLanguageModel

ENGINES_KEPT = 2
"""Only the last checkpoints can be resumed; the others keep their model."""


@dataclass(frozen=True)
class Progress:
    """What a run must remember besides the tensors: `trainer.json`."""

    step: int
    """Global batches taken from the plan."""
    updates: int
    """Optimiser steps; smaller where steps were refused or skipped."""
    epoch: int
    batch: int
    """The next place in the plan."""
    global_batch_size: int
    seed: int
    samples: int
    """Of the indexed data; 0 for a stream."""
    data: str
    """Fingerprint of the data."""
    shard: int = 0
    row: int = 0
    """As in `Position`."""

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.batch, self.shard, self.row)

    def at(self, place: Position, step: int, updates: int) -> "Progress":
        """The progress once all before `place` has been taken."""
        return replace(self, step=step, updates=updates, **asdict(place))


class Run:
    """A run's directory."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.dir, self.config, self.world = config.output_dir, config, world
        self.log, self.ledger = self.dir / "log.jsonl", self.dir / "ledger.jsonl"
        world.from_first(self._create)
        if len(world.gather([None] if self.dir.is_dir() else [])) < world.size:
            raise UsageError(f"{self.dir} is not seen by every rank; it must lie on shared storage")

    def _create(self) -> None:
        if (self.dir / "config.json").exists():
            raise UsageError(
                f"output_dir {self.dir} is a model's directory; give the run one of its own"
            )
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            for torn in self.dir.glob("checkpoint-*.partial"):
                shutil.rmtree(torn)
            (self.dir / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"output_dir {self.dir} cannot be written ({error})") from None

    def begin(self, samples: int, data: str) -> Progress:
        """Where a fresh run stands. The size of its global batches is fixed here, for good."""
        config = self.config
        per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
        size = config.global_batch_size or per_rank * self.world.size
        return Progress(0, 0, 0, 0, size, config.seed, samples, data)

    def check(self, progress: Progress, samples: int, data: str) -> None:
        """UsageError where the data or the options no longer give the batches of `progress`."""
        if (progress.samples, progress.data) != (samples, data):
            raise UsageError(
                f"the data differs from what {self.dir} was started with; use another dir"
            )
        size = self.config.global_batch_size or progress.global_batch_size
        if (progress.seed, progress.global_batch_size) != (self.config.seed, size):
            raise UsageError(
                f"{self.dir} was started with seed {progress.seed} and global_batch_size "
                f"{progress.global_batch_size}, which fix its batches; keep them or use another dir"
            )

    def latest(self) -> tuple[Path, Progress] | None:
        """The newest checkpoint that can be resumed, or None for a fresh run."""
        return self.world.from_first(self._find_latest)

    def _find_latest(self) -> tuple[Path, Progress] | None:
        for folder in reversed(self.checkpoints()):
            trainer = folder / "trainer.json"  # a folder that is being deleted may lack it
            if (folder / "engine").is_dir() and trainer.is_file():
                return folder, Progress(**json.loads(trainer.read_text(encoding="utf-8")))
        return None

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [p for p in self.dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda folder: int(folder.name.split("-")[1]))

    def save(
        self, model: VisionLanguageModel, engine: Engine, progress: Progress, companions: Path
    ) -> None:
        """Write checkpoint-<step>, with the tokenizer and processor files of `companions`; every
        rank calls this."""
        final = self.dir / f"checkpoint-{progress.step}"
        partial = final.with_name(final.name + ".partial")
        self.world.from_first(lambda: _fresh_folder(partial / "engine"))
        tensors = {_key(f): f.values.cpu().contiguous() for f in engine.fragments()}
        tensors["rng"] = torch.get_rng_state()
        save_file(tensors, partial / "engine" / f"rank-{self.world.rank:05d}.safetensors")

        def finish() -> None:
            save_model(partial / "model", model.state_dict().items(), companions)
            write_json(partial / "trainer.json", asdict(progress))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _replace_text(self.dir / "latest", final.name)
            self._prune()

        self.world.check_in()
        self.world.from_first(finish)

    def _prune(self) -> None:
        checkpoints = self.checkpoints()
        for folder in checkpoints[: -self.config.save_total_limit]:
            shutil.rmtree(folder)
        for folder in checkpoints[:-ENGINES_KEPT]:
            shutil.rmtree(folder / "engine", ignore_errors=True)


def restore_engine(folder: Path, engine: Engine, updates: int, rank: int) -> None:
    """Fill the engine's fragments from a checkpoint that any number of ranks wrote.

    Raises UsageError where the checkpoint does not hold all of a parameter.
    """
    stored = _StoredFragments(folder / "engine")
    for fragment in engine.fragments():
        stored.read_into(fragment)
    engine.restored(updates)
    own = folder / "engine" / f"rank-{rank:05d}.safetensors"
    if own.exists():
        with safe_open(own, framework="pt") as file:
            torch.set_rng_state(file.get_tensor("rng"))


class _StoredFragments:
    """Fragments on disk by parameter and kind, whichever rank wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[tuple[str, str], list[tuple[int, int, object, str]]] = defaultdict(list)
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key == "rng":
                    continue
                parameter, kind, start = key.split("|")
                (length,) = file.get_slice(key).get_shape()
                self.pieces[parameter, kind].append((int(start), length, file, key))

    def read_into(self, wanted: Fragment) -> None:
        begin, end = wanted.start, wanted.start + len(wanted.values)
        covered = 0
        for start, length, file, key in self.pieces[wanted.parameter, wanted.kind]:
            low, high = max(begin, start), min(end, start + length)
            if low < high:
                piece = file.get_slice(key)[low - start : high - start]
                wanted.values[low - begin : high - begin].copy_(piece)
                covered += high - low
        if covered != end - begin:
            raise UsageError(
                f"{self.folder} holds {covered} of {end - begin} values of {wanted.parameter} "
                f"({wanted.kind}); was it written with other freeze options?"
            )


def _key(fragment: Fragment) -> str:
    return f"{fragment.parameter}|{fragment.kind}|{fragment.start}"


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)

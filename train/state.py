"""The run on disk: directory, checkpoints, exact resume on any number of ranks.

    output_dir/
      config.yaml log.jsonl ledger.jsonl latest
      checkpoint-<step>/
        model/                        the hub's layout, loadable as it is
        engine/rank-*.safetensors     each rank's own fragments of masters and moments
        trainer.json                  step, place in the plan, updates
        checksums.json                of all these files

A checkpoint is written beside its final name, by a thread while training goes on, and renamed once
it is on the disk: it is whole or absent. One that was damaged later is put aside at a resume.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from errno import ENOSPC
from functools import partial
from itertools import count
from pathlib import Path

import yaml
from torch import Tensor, nn

from train.checksums import flaw, read_checksums
from train.config import TrainConfig, UsageError
from train.engine import MOMENTS, Engine
from train.fragments import fragments_of, random_state
from train.snapshot import HostCopies, Snapshot, Writer, check_room, write_text
from train.world import World
from vlm.data.plan import Position
from vlm.partial import sync
from vlm.tensor_file import CheckpointError

ENGINES_KEPT = 2
"""Only the last checkpoints can be resumed; the others keep their model."""
LAST_WAIT = 60
"""Seconds that an error waits for the checkpoint at hand: where a rank is dead it never ends."""


class SaveError(RuntimeError):
    """A checkpoint or the log could not be written; the checkpoints before are whole."""


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
        self.began = time.monotonic()
        self.dir, self.config, self.world = config.output_dir, config, world
        self.log, self.ledger = self.dir / "log.jsonl", self.dir / "ledger.jsonl"
        self.about: list[str] = []
        """For the person who watches: what was found in the directory."""
        self._copies, self._writer = HostCopies(), Writer()
        self._saved: dict = {}
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
        except OSError as error:
            raise UsageError(f"output_dir {self.dir} cannot be written ({error})") from None
        if not os.access(self.dir, os.W_OK):
            raise UsageError(f"output_dir {self.dir} cannot be written")
        self._tell_changes()

    def _tell_changes(self) -> None:
        new = yaml.safe_load(self.config.to_yaml())
        with suppress(FileNotFoundError, TypeError, yaml.YAMLError):  # none yet, or no longer one
            old = yaml.safe_load((self.dir / "config.yaml").read_text(encoding="utf-8"))
            changed = [name for name in new if name in old and old[name] != new[name]]
            texts = ", ".join(f"{name}: {old[name]} -> {new[name]}" for name in changed)
            if texts:
                self.about.append(f"options that differ from those of the last start: {texts}")

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

    @contextmanager
    def training(self, model: nn.Module, log: Callable[..., None]) -> Iterator[None]:
        """The block in which checkpoints are saved; at its end all of them are on the disk.

        Args:
            log: is called as `log("saved", step, **figures)` some time after each.

        Raises:
            UsageError: at the start, the disk has no room for one checkpoint of the model.
            SaveError: at the end, the last one could not be written; or the disk ran full.
        """
        self.world.from_first(lambda: self._settle(model))
        self._log = log
        try:
            yield
        except BaseException as error:
            self._writer.join(LAST_WAIT)
            if isinstance(error, OSError) and error.errno == ENOSPC:  # the log's
                raise SaveError(f"{self.dir}: {error.strerror}; {self._next()}") from error
            raise
        self.wait()

    def _settle(self, model: nn.Module) -> None:
        """All options have been accepted: keep them."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        check_room(self.dir, weights + 4 * (1 + len(MOMENTS)) * trained)
        try:
            write_text(self.dir / "config.yaml", self.config.to_yaml())
        except OSError as error:
            raise UsageError(f"output_dir {self.dir} cannot be written ({error})") from None

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [p for p in self.dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda folder: int(folder.name.split("-")[1]))

    def latest(self) -> tuple[Path, Progress] | None:
        """The newest checkpoint whose files are as they were written, or None for a fresh run.

        Every rank calls this, and reads a share of the files. Newer ones that are broken are
        renamed, and told in `about`.

        Raises UsageError where there are checkpoints but none can be resumed.
        """
        broken: dict[Path, str] = {}
        for folder in reversed(self.world.from_first(self.checkpoints)):
            try:
                progress = self._read(folder)
            except CheckpointError as error:
                broken[folder] = str(error)
                continue
            self.world.from_first(partial(self._resume, folder, broken))
            return folder, progress
        if broken:
            flaws = "; ".join(f"{folder.name}: {flaw}" for folder, flaw in broken.items())
            raise UsageError(
                f"{self.dir} has no checkpoint that can be resumed ({flaws}); restore one, or "
                "give another output_dir"
            )
        return None

    def _read(self, folder: Path) -> Progress:
        """CheckpointError, on every rank, says what is wrong with a checkpoint."""
        if not self.world.from_first((folder / "engine").is_dir):
            raise CheckpointError("it keeps its model alone")
        files = list(self.world.from_first(lambda: read_checksums(folder)).items())
        share = files[self.world.rank :: self.world.size]
        flaws = self.world.gather([flaw(folder, *file) for file in share])
        for text in filter(None, flaws):
            raise CheckpointError(text)
        try:
            return Progress(**json.loads((folder / "trainer.json").read_text(encoding="utf-8")))
        except TypeError:
            raise CheckpointError("another version of train/state.py wrote it") from None

    def _resume(self, whole: Path, broken: dict[Path, str]) -> None:
        for folder, text in broken.items():
            names = (f"{folder.name}.broken{number or ''}" for number in count())
            name = next(name for name in names if not (self.dir / name).exists())
            os.replace(folder, self.dir / name)
            self.about.append(
                f"{folder.name} cannot be resumed ({text}); it is now {name}, and the run goes on "
                f"from {whole.name}"
            )
        write_text(self.dir / "latest", whole.name)

    def reserve(self, model: nn.Module, engine: Engine) -> None:
        """Take the memory for copies beside the first steps, not in the first save."""
        tensors = [*fragments_of(engine), *self._weights(model)]
        self._writer.start(lambda: self._copies.reserve(tensors))

    def _weights(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        return model.state_dict().items() if self.world.first else ()

    def save(self, model: nn.Module, engine: Engine, progress: Progress, companions: Path) -> None:
        """Copy the state to the host's memory, and let a thread write checkpoint-<step>; every
        rank calls this.

        Args:
            companions: has the tokenizer and processor files of the run's first checkpoint; the
                others take them from the one before, since an old one may be gone.

        Raises:
            SaveError: the last checkpoint could not be written.
        """
        began = time.perf_counter()
        self.wait()
        before = self.checkpoints()
        snapshot = Snapshot(
            self._copies.take(fragments_of(engine)) | random_state(),
            self._copies.take(self._weights(model)),
            asdict(progress),
            before[-1] / "model" if before else companions,
        )
        waited = time.perf_counter() - began
        self._writer.start(lambda: self._write(snapshot, progress.step, waited))

    @property
    def failed(self) -> bool:
        """This rank knows that a checkpoint could not be written; the next save raises it."""
        return self._writer.failed

    def wait(self) -> None:
        """Until the last checkpoint, if there is one, is on the disk; SaveError as in `save`."""
        self._writer.wait()
        if self._saved:
            self._log("saved", **self._saved)
            self._saved = {}

    def _write(self, snapshot: Snapshot, step: int, waited: float) -> None:
        """In the thread of each rank."""
        began, world = time.perf_counter(), self.world.background
        final = self.dir / f"checkpoint-{step}"
        folder = final.with_name(final.name + ".partial")
        try:
            size = snapshot.write(folder, world)
            world.from_first(lambda: self._put_in_place(folder, final))
        except (OSError, UsageError, CheckpointError) as error:
            if world.first:
                shutil.rmtree(folder, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise SaveError(f"{final} could not be written: {reason}; {self._next()}") from error
        self._saved = {
            "step": step,
            "seconds": round(time.perf_counter() - began + waited, 4),
            "waited": round(waited, 4),  # of these, training
            "gigabytes": round(size / 1e9, 4),
        }

    def _next(self) -> str:
        whole = self.checkpoints()
        return f"the same command goes on from {whole[-1].name if whole else 'the start'}"

    def _put_in_place(self, folder: Path, final: Path) -> None:
        os.replace(folder, final)
        sync(self.dir)
        write_text(self.dir / "latest", final.name)
        checkpoints = self.checkpoints()
        for old in checkpoints[: -self.config.save_total_limit]:
            self._delete(old, old)
        for old in checkpoints[-self.config.save_total_limit : -ENGINES_KEPT]:
            if (old / "engine").exists():
                self._delete(old / "engine", old)

    def _delete(self, folder: Path, checkpoint: Path) -> None:
        """At once or not at all: what a kill leaves of it the next start clears away."""
        doomed = checkpoint.with_name(checkpoint.name + ".partial")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)

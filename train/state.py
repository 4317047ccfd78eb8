"""The run on disk: directory, checkpoints, exact resume on any number of ranks.

    output_dir/
      config.yaml log.jsonl ledger.jsonl latest .lock
      checkpoint-<step>/
        model/                        the hub's layout, loadable as it is
        engine/rank-*.safetensors     each rank's own fragments of masters and moments
        trainer.json                  step, place in the plan, updates
        checksums.json                of all these files

A checkpoint is written beside its final name, by a thread while training goes on, and renamed once
it is on the disk: it is whole or absent. One that was damaged later is put aside at a resume. A dry
run only reads.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from socket import gethostname
from typing import TextIO

import yaml
from torch import Tensor, nn

from train.checksums import flaw, read_checksums
from train.config import TrainConfig, UsageError
from train.disk import FULL, check_room, write_text
from train.engine import MOMENTS, Engine
from train.fragments import check_fragments, fragments_of, random_state
from train.freeze import Group
from train.lock import lock, owner
from train.snapshot import HostCopies, Snapshot, Writer
from train.world import World
from vlm.data.plan import Position
from vlm.partial import sync
from vlm.tensor_file import CheckpointError

CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
TORN = re.compile(r"checkpoint-[0-9]+\.partial")
"""Of a checkpoint, on its way to the disk or from it."""
ENGINES_KEPT = 2
"""Only the last checkpoints can be resumed; the others keep their model."""
LAST_WAIT = 60
"""Seconds that an error waits for the checkpoint at hand: where a rank is dead it never ends."""


class RunError(RuntimeError):
    """The run cannot go on, though nothing is wrong with what was asked for: a checkpoint or the
    log could not be written, or too many steps were refused. Its checkpoints are whole."""


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
        self._lock: TextIO | nullcontext = nullcontext()
        """The first rank's, until it is closed."""
        mine = world.from_first(self._open)
        if not config.dry_run:
            same = world.first or owner(self.dir) == mine
            for host in world.gather([] if same else [gethostname()]):
                raise UsageError(
                    f"output_dir {self.dir} on {host} is not the one that the first rank sees; "
                    "give one on storage that all nodes share"
                )

    def _open(self) -> str:
        """Make the directory this run's; what its lock now says."""
        if (self.dir / "config.json").exists():
            raise UsageError(
                f"output_dir {self.dir} is a model's directory; give the run one of its own"
            )
        mine = ""
        try:
            if not self.config.dry_run:
                self.dir.mkdir(parents=True, exist_ok=True)
                self._lock, mine = lock(self.dir)
                for torn in self.dir.iterdir():
                    if TORN.fullmatch(torn.name):
                        shutil.rmtree(torn)
        except OSError as error:
            raise UsageError(f"output_dir {self.dir} cannot be written ({error})") from None
        there = self._existing()
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UsageError(f"output_dir {self.dir} cannot be written")
        self._tell_changes()
        return mine

    def _existing(self) -> Path:
        """The directory, or in a dry run the one above that it would be made in."""
        return next(path for path in (self.dir, *self.dir.parents) if path.exists())

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

    def check_start(
        self, model: nn.Module, groups: list[Group], found: tuple[Path, Progress] | None
    ) -> None:
        """UsageError where the checkpoint that was found lacks state of what trains now, or the
        disk has no room for one; every rank calls this."""
        self.world.from_first(lambda: self._check_start(model, groups, found and found[0]))

    def _check_start(self, model: nn.Module, groups: list[Group], folder: Path | None) -> None:
        if folder:
            check_fragments(folder, groups)
        trained = sum(p.numel() for group in groups for p in group.parameters.values())
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        check_room(self._existing(), weights + 4 * (1 + len(MOMENTS)) * trained)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A block that writes to the directory: RunError where the disk, or a quota, is full."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise RunError(f"{self.dir}: {error.strerror}; {self._next()}") from error
            raise

    @contextmanager
    def training(self, log: Callable[..., None]) -> Iterator[None]:
        """The block in which checkpoints are saved; at its end all of them are on the disk, and
        the directory is free for another process.

        Args:
            log: is called as `log("saved", step, **figures)` some time after each.

        Raises:
            RunError: at the end, the last one could not be written; or the disk ran full.
        """
        self._log = log
        with self._lock, self.writing():
            try:
                yield
            except BaseException:
                self._writer.join(LAST_WAIT)
                raise
            self.wait()

    def keep_options(self) -> None:
        """Write `config.yaml`: all options have been accepted, and steps are taken with them; every
        rank calls this."""
        self.world.from_first(self._keep_options)

    def _keep_options(self) -> None:
        try:
            write_text(self.dir / "config.yaml", self.config.to_yaml())
        except OSError as error:
            raise UsageError(f"output_dir {self.dir} cannot be written ({error})") from None

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        names = os.listdir(self.dir) if self.dir.exists() else ()
        found = filter(None, map(CHECKPOINT.fullmatch, names))
        return [self.dir / name[0] for name in sorted(found, key=lambda name: int(name[1]))]

    def latest(self) -> tuple[Path, Progress] | None:
        """The newest checkpoint whose files are as they were written, or None for a fresh run.

        Every rank calls this, and reads a share of the files. Newer ones that are broken are
        renamed, but for a dry run, and told in `about`.

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
            now = "" if self.config.dry_run else f"it is now {self._put_aside(folder)}, and "
            self.about.append(
                f"{folder.name} cannot be resumed ({text}); {now}the run goes on from {whole.name}"
            )
        if not self.config.dry_run:
            write_text(self.dir / "latest", whole.name)

    def _put_aside(self, folder: Path) -> str:
        names = (f"{folder.name}.broken{number or ''}" for number in count())
        name = next(name for name in names if not (self.dir / name).exists())
        os.replace(folder, self.dir / name)
        return name

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
            RunError: the last checkpoint could not be written.
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
        """Until the last checkpoint, if there is one, is on the disk; RunError as in `save`."""
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
            raise RunError(f"{final} could not be written: {reason}; {self._next()}") from error
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

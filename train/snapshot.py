"""A checkpoint on its way to the disk: copied to the host's memory in a moment, written by a thread
while training goes on.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from train.checksums import CHECKSUMS, checksums
from train.disk import check_room, write_text
from train.fragments import rank_file, write_tensors
from train.world import World
from vlm.checkpoint import save_model
from vlm.partial import sync


class HostCopies:
    """Memory for one snapshot, kept from save to save: fresh memory costs several times a copy."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def reserve(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take the memory for copies of these, where it has not been taken yet."""
        for name, tensor in tensors:
            if name not in self._held:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._held[name] = copy.zero_()  # a page is taken when it is first written

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The values as they are now; valid until the next copy of the same names."""
        originals = dict(tensors)
        self.reserve(originals.items())
        for name, tensor in originals.items():
            self._held[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in originals.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._held[name] for name in originals}


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint."""

    state: dict[str, Tensor]
    """What its file in `engine/` holds."""
    weights: dict[str, Tensor]
    """The model's, on the first rank; empty on the others."""
    progress: dict
    """What `trainer.json` holds."""
    companions: Path
    """The directory that tokenizer and processor files are taken from."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.state.values(), *self.weights.values()))

    def write(self, folder: Path, world: World) -> float:
        """All of the checkpoint, on the disk at return; every rank calls this.

        Returns:
            Its bytes.

        Raises:
            UsageError: the disk has too little room; OSError: it ran full, or worse.
        """
        (size,) = world.sum([self.nbytes])
        world.from_first(lambda: _fresh_folder(folder, size))
        parts = world.on_all(lambda: self._write_own(folder, world))
        world.from_first(lambda: self._complete(folder, parts))
        return size

    def _write_own(self, folder: Path, world: World) -> dict[str, list[int]]:
        files = [rank_file(folder, world.rank)]
        write_tensors(files[0], self.state)
        if world.first:
            save_model(folder / "model", self.weights.items(), self.companions)
            files += (folder / "model").iterdir()
        return checksums(folder, files)

    def _complete(self, folder: Path, parts: list[dict[str, list[int]]]) -> None:
        write_text(folder / "trainer.json", json.dumps(self.progress, indent=2))
        parts = [*parts, checksums(folder, [folder / "trainer.json"])]
        sums = {name: written for part in parts for name, written in part.items()}
        write_text(folder / CHECKSUMS, json.dumps(sums, indent=2))
        sync(folder / "engine")


class Writer:
    """A thread that does one job at a time."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """The last job has raised something, which `wait` will raise."""
        return self._error is not None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job; the one before it must have been waited for."""

        def work() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised again by `wait`
                self._error = error

        # daemon: a rank that waits for a dead one must be able to end
        self._thread = Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the job's end, at most so long."""
        if self._thread:
            self._thread.join(seconds)

    def wait(self) -> None:
        """Wait for the job's end, and raise what it raised."""
        self.join()
        error, self._error = self._error, None
        if error:
            raise error


def _fresh_folder(folder: Path, size: float) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    check_room(folder.parent, size)
    (folder / "engine").mkdir(parents=True)

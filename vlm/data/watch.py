"""What each data worker is at, so that one that dies or hangs can be told with its sample."""

import os
import re
import signal
import time
from collections.abc import Callable
from multiprocessing import active_children

import torch


class DataWorkerError(RuntimeError):
    """A data worker died or made no progress; the message names the sample that it was at."""


class Watch:
    """A small table in shared memory: one row per worker, written by it, read by its parent."""

    def __init__(self, workers: int) -> None:
        # process id, number of the sample (-1 for none), and when it was begun
        self._rows = torch.full((workers, 3), -1.0, dtype=torch.float64).share_memory_()
        self._own: int | None = None

    def enter(self, worker: int) -> None:
        """In a worker, at its start."""
        self._own = worker
        self._rows[worker, 0] = os.getpid()

    def at(self, number: int) -> None:
        """In a worker: it begins sample `number`, or rests (-1). Elsewhere nothing happens."""
        if self._own is not None:
            self._rows[self._own, 1:] = torch.tensor([number, time.monotonic()])

    def explain(self, error: BaseException, name: Callable[[int], str]) -> str | None:
        """A sentence about an error of the DataLoader; None for any other.

        Args:
            name: id of the sample of a number.
        """
        text = f"{error} {error.__cause__ or ''}".strip()  # the signal is in the cause
        if not (isinstance(error, RuntimeError) and text.startswith("DataLoader")):
            return None
        rows = [(int(pid), int(n), began) for pid, n, began in self._rows.tolist() if n >= 0]
        dead = {int(pid) for pid in re.findall(r"\d+", text.partition("pid")[2])}
        if dead:
            names = [name(number) for pid, number, _ in rows if pid in dead]
            how = re.search(r"killed by signal: ([\w ]+)", text)
            how = f"was killed ({how[1].strip()})" if how else "died"
            where = f"while it read {', '.join(names)}" if names else "between two samples"
            return (
                f"a data worker {how} {where}; is memory short, or the file broken? Fewer "
                "dataloader_num_workers take less memory"
            )
        now = time.monotonic()
        stuck = [f"{name(number)} (since {now - began:.0f} s)" for _, number, began in rows]
        return (
            f"no data came in time ({error}); the workers are at "
            f"{', '.join(stuck) or 'no sample'}; is the storage down, or dataloader_timeout short?"
        )

    def kill(self) -> None:
        """End the workers, even stuck ones, without waiting for them."""
        raising = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's, for each of them
        pids = set(self._rows[:, 0].tolist())
        for child in active_children():
            if child.pid in pids:
                child.kill()
                child.join()
        signal.signal(signal.SIGCHLD, raising)  # torch sets it but once in a process

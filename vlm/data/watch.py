"""What each data worker is at, so that one that dies or hangs can be told with its sample."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

NOTICED_AFTER = 2.0
"""Seconds from the first sign that a worker is gone to its end."""


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
            self._rows[self._own, 1:] = torch.tensor(
                [number, time.monotonic()], dtype=torch.float64
            )

    def end(
        self,
        error: BaseException | None,
        workers: Sequence[BaseProcess],
        name: Callable[[int], str],
    ) -> str | None:
        """Kill the workers, even stuck ones, because of an error or at the end.

        Args:
            name: id of the sample of a number.

        Returns:
            A sentence about the error, if they are to blame for it; else None.
        """
        raising = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's, for each dead worker
        message = self._explain(error, workers, name)
        for worker in workers:
            worker.kill()
            worker.join()
        signal.signal(signal.SIGCHLD, raising)  # torch sets it but once in a process
        return message

    def _explain(self, error, workers, name) -> str | None:
        from_loader = isinstance(error, RuntimeError) and str(error).startswith("DataLoader")
        if not (from_loader or isinstance(error, OSError | EOFError)):
            return None
        rows = [(int(pid), int(n), began) for pid, n, began in self._rows.tolist() if n >= 0]
        if from_loader and "timed out" in str(error):
            now = time.monotonic()
            stuck = [f"{name(number)} (since {now - began:.0f} s)" for _, number, began in rows]
            return (
                f"no data came in time ({error}); the workers are at "
                f"{', '.join(stuck) or 'no sample'}; is the storage down, or dataloader_timeout "
                "short?"
            )
        # a tensor that was being handed over breaks off before the worker's end is seen
        wait([worker.sentinel for worker in workers], NOTICED_AFTER)
        dead = {worker.pid: worker.exitcode for worker in workers if worker.exitcode}
        if not dead:
            return str(error) if from_loader else None
        pid, code = next(iter(dead.items()))
        names = [name(number) for owner, number, _ in rows if owner == pid]
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
        return (
            f"a data worker {how} "
            + (f"while it read {names[0]}" if names else "between two samples")
            + "; is memory short, or the file broken? Fewer dataloader_num_workers take less memory"
        )

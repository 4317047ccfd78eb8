"""Which rank is gone, when the others wait for it in vain.

A thread of each rank counts up in the launcher's store, whatever the rank itself is waiting for.
A rank that is killed or stopped falls silent there, so the others can name it and end: in a
collective of the backward pass too, where gloo and NCCL know neither the rank nor, for NCCL,
how to tell Python.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

BEAT = 1.0
"""Seconds between signs of life."""


class Pulse:
    """This rank's signs of life, and the others'."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        """Start the thread; a rank that is silent for `timeout` seconds ends this process."""
        self.place = 0
        """How many collectives of the step's bookkeeping this rank has come to."""
        self._rank, self._size = rank, size
        # a little before the groups' own timeouts, which cannot name the rank
        self._limit = 0.9 * timeout
        launcher = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # a connection of its own: the process groups' store is locked while a rank waits in it
        store = dist.TCPStore(*launcher, is_master=False, timeout=timedelta(seconds=30 * BEAT))
        self._store = dist.PrefixStore(f"pulse/{attempt}", store)
        self._ended = threading.Event()
        self._set(0)
        threading.Thread(target=self._run, daemon=True, name="pulse").start()

    def stop(self) -> None:
        self._ended.set()

    def leave_if_rank_lost(self, error: RuntimeError) -> None:
        """End this process where a rank has fallen silent, or where one that all have waited for
        too long has not come as far as this one."""
        with suppress(dist.DistError):  # the launcher is gone, and its ranks with it
            before = self._read()
            time.sleep(2.5 * BEAT)
            now = self._read()
            for rank in range(self._size):
                if now[rank] == before[rank]:
                    self._leave(rank, "was killed, has ended or is stopped")
            for rank, (_, place) in enumerate(now):
                if place < self.place and "Timed out waiting" in str(error):  # gloo's words
                    self._leave(rank, "lives, but did not come to where all wait for it")

    def _run(self) -> None:
        """Beat; now and then look who is silent for too long."""
        beats, heard = 0, [((-1, -1), time.monotonic())] * self._size
        look = every = self._limit / 10
        began = time.monotonic()
        with suppress(dist.DistError):
            while not self._ended.wait(BEAT):
                beats += 1
                self._set(beats)
                now = time.monotonic()
                if now - began < look:
                    continue
                look += every
                for rank, pulse in enumerate(self._read()):
                    if pulse != heard[rank][0]:
                        heard[rank] = pulse, now
                    elif now - heard[rank][1] > self._limit:
                        self._leave(rank, f"has given no sign of life for {self._limit:.0f} s")

    def _set(self, beats: int) -> None:
        self._store.set(str(self._rank), f"{beats} {self.place}")

    def _read(self) -> list[tuple[int, int]]:
        """Beats and place of every rank."""
        values = self._store.multi_get([str(rank) for rank in range(self._size)])
        return [tuple(map(int, value.split())) for value in values]

    def _leave(self, rank: int, what: str) -> None:
        """End this process at once, since closing its groups would wait for the lost rank; the
        first one to come here says why."""
        if self._store.add("told", 1) == 1:
            print(
                f"error: rank {rank} {what}; the others end too. "
                "The same command resumes from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

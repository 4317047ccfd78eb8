"""The ranks of a run: who this process is, and what all of them know together.

What the step's bookkeeping needs (counts, bad samples, errors) travels over a gloo group on the
CPU, so that no device waits for it.
"""

import ctypes
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from train.config import TrainConfig
from train.pulse import Pulse

INDEXING_TAKES = timedelta(hours=12)
"""While the first rank indexes the data the others wait."""
LAUNCH = {"RANK", "WORLD_SIZE", "MASTER_ADDR"}
"""What torchrun sets; a variable of them that is left over from elsewhere launches nothing."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    launched: bool
    """By torchrun; else this is one plain process."""
    timeout: timedelta = timedelta(seconds=TrainConfig.ddp_timeout)
    """After which a rank that does not answer is called missing."""
    group: Any = None
    """The CPU group; None for a plain process."""
    spare_group: Any = None
    """Another one, for `background`."""
    pulse: Pulse | None = None

    @classmethod
    def start(
        cls, deterministic: bool = False, ddp_timeout: float = TrainConfig.ddp_timeout
    ) -> "World":
        """Join the ranks that torchrun started, or be alone."""
        if deterministic:
            _be_deterministic()
        cuda = torch.cuda.is_available()
        if not os.environ.keys() >= LAUNCH:
            return cls(0, 1, torch.device("cuda" if cuda else "cpu"), launched=False)
        _die_with_parent()
        device = torch.device("cpu")
        if cuda:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=INDEXING_TAKES)
        group, spare = (dist.new_group(backend="gloo", timeout=INDEXING_TAKES) for _ in range(2))
        rank, size = dist.get_rank(), dist.get_world_size()
        pulse, timeout = Pulse(rank, size, ddp_timeout), timedelta(seconds=ddp_timeout)
        return cls(rank, size, device, True, timeout, group, spare, pulse)

    def stop(self) -> None:
        if self.launched:
            self.pulse.stop()
            dist.destroy_process_group()

    def limit_waits(self) -> None:
        """From here on no collective waits longer than the timeout, but for the background's: its
        ranks wait while one of them writes."""
        for group in distributed_c10d._world.pg_map if self.launched else ():
            if group is not self.spare_group:
                distributed_c10d._set_pg_timeout(self.timeout, group)

    def leave_if_rank_lost(self, error: RuntimeError) -> None:
        """Where an error comes of a rank that is gone, say so and end this process."""
        if self.size > 1:
            self.pulse.leave_if_rank_lost(error)

    @property
    def background(self) -> "World":
        """The same ranks over a CPU group of its own, for a thread beside the training."""
        return replace(self, group=self.spare_group, pulse=None)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check_in(self) -> None:
        """Wait for every rank; RuntimeError names one that is missing."""
        if self.size > 1:
            self._arrive()
            dist.monitored_barrier(self.group, timeout=self.timeout)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element by element over all ranks, in float64."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            self._arrive()
            dist.all_reduce(totals, group=self.group)
        return totals.tolist()

    def gather(self, items: list) -> list:
        """The lists of all ranks, one after the other."""
        if self.size == 1:
            return items
        self._arrive()
        lists: list[list] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, items, group=self.group)
        return [item for part in lists for item in part]

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns (or raises) on the first rank, on every rank."""
        if self.size == 1:
            return work()
        self._arrive()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:  # noqa: BLE001 - raised again below, on every rank
                outcome[1] = portable(error)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on this rank; an error of one rank is raised on all."""
        if self.size == 1:
            return work()
        result, errors = None, []
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised again below, on every rank
            errors = [portable(error)]
        for error in self.gather(errors):
            raise error
        return result

    def on_all(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns on each rank, on every rank; an error of one is raised on all."""
        return self.gather([self.together(work)])

    def from_first_of_machine(self, work: Callable[[], Any]) -> Any:
        """What `work` returns (or raises) on each machine's first rank, on every rank there.

        An error on one machine is raised on all.
        """
        local_rank = int(os.environ["LOCAL_RANK"]) if self.size > 1 else 0
        results = self.on_all(lambda: work() if local_rank == 0 else None)
        return results[self.rank - local_rank]

    def _arrive(self) -> None:
        if self.pulse:
            self.pulse.place += 1


def portable(error: Exception) -> Exception:
    """The error, or, where it does not survive the way to another process, a RuntimeError that
    says the same: a rank that fails at the sending would leave the others waiting."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever a library's error does while it is taken apart
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _be_deterministic() -> None:
    """Refuse kernels whose result depends on the order in which threads come."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost a pass each
    torch.backends.cudnn.benchmark = False


def _die_with_parent() -> None:
    """Linux: a killed launcher takes its workers along, instead of leaving them to train on."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

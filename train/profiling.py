"""`--profile`: where a step's time and memory go, from torch's own profiler.

`profile/trace.json.gz` opens in https://ui.perfetto.dev, `profile/memory.pickle` (of a CUDA device)
in https://pytorch.org/memory_viz.
"""

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP, TRACED = 2, 3
"""Steps."""
MOST_EVENTS = 1_000_000
"""Allocations that the memory's history holds."""


class Profiler:
    """A context around the loop, which calls `step` at the end of each step.

    The first `WARM_UP` steps settle, the next `TRACED` ones are traced; where the run ends among
    them, those it had.
    """

    def __init__(self, folder: Path, enabled: bool) -> None:
        """`enabled` on one rank at most: all would write the same files."""
        self.folder, self.enabled = folder, enabled
        self.taken = 0
        self.on_cuda = torch.cuda.is_available()

    def __enter__(self) -> "Profiler":
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_cuda
            plan = schedule(wait=0, warmup=WARM_UP, active=TRACED, repeat=1)
            self.profile = profile(
                activities=activities,
                schedule=plan,
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self.profile.__enter__()
        return self

    def step(self) -> None:
        """A step is done."""
        if not self.enabled:
            return
        self.taken += 1
        if self.taken == WARM_UP and self.on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        self.profile.step()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.enabled:
            self.profile.__exit__(kind, error, traceback)
            if self.taken <= WARM_UP:
                print(f"profile: nothing is traced, since the first {WARM_UP} steps only warm up")

    def _write(self, done: profile) -> None:
        if self.taken > WARM_UP:
            done.export_chrome_trace(str(self.folder / "trace.json.gz"))
        if self.on_cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

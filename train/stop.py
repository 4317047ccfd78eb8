"""When a run saves or ends before its last step: signals, a time limit, a failed write.

SIGTERM: save and end. SIGUSR1: save and go on. What one rank wishes, all do at the same step: the
loop sums the wishes with the step's other counts.
"""

import signal
import time

from train.config import TrainConfig
from train.state import Run

SAVE = 1
END = 1_000_000
"""More than there are ranks, so that a sum of wishes from here on holds an END."""


class Stop:
    """Hears signals inside its `with` block: elsewhere they have their usual effect, since there is
    nothing to save. The time limit counts from the start of the run."""

    def __init__(self, config: TrainConfig, run: Run) -> None:
        self._until = run.began + 3600 * (config.max_hours or float("inf"))
        self._run = run
        self._save = self._end = False

    def __enter__(self) -> "Stop":
        self._before = {n: signal.signal(n, self._heard) for n in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _frame) -> None:
        if number == signal.SIGTERM:
            self._end = True
        else:
            self._save = True

    def wish(self) -> int:
        """This rank's, at this step: 0, SAVE or END. A failed write wishes for the end too: the
        save that comes with it raises what went wrong."""
        if self._end or self._run.failed or time.monotonic() >= self._until:
            return END
        if self._save:
            self._save = False
            return SAVE
        return 0

"""The work of the index on the rows of a chunk, in this process or in several."""

import signal
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from vlm.data.index_cache import media_stamp
from vlm.data.processor import Processor, Sizes
from vlm.data.schema import BadSample
from vlm.data.sources import Place, Source

Result = tuple[dict[int, Sizes], dict[int, int], dict[int, str]]
"""Sizes and stamps of a chunk's good rows and reasons of its bad ones, by their number in the
chunk; of those known before only where they changed."""


def measure_rows(number: int, rows: list[tuple[int, object, Place, int | None]]) -> Result:
    """Measure rows of a source, in a process that `open_executor` prepared."""
    sources, processor = _state
    sizes, stamps, reasons = {}, {}, {}
    for row, raw, place, known in rows:
        try:
            sample = sources[number].parse(raw, place)
            try:
                stamp = media_stamp(sample)
            except (OSError, ValueError):
                stamp = None  # `measure` says what is wrong
            if stamp is None or stamp != known:
                sizes[row] = processor.measure(sample)
                stamps[row] = stamp or 0
        except BadSample as error:
            reasons[row] = error.reason
    return sizes, stamps, reasons


_state: tuple = ()


def _remember(*state) -> None:
    global _state
    _state = state


def _begin_worker(*state) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    _remember(*state)


@contextmanager
def open_executor(
    sources: tuple[Source, ...], processor: Processor, workers: int
) -> Iterator[Executor]:
    """Runs `measure_rows` in so many processes; 1 is this one alone."""
    state = (sources, processor)
    if workers <= 1:
        _remember(*state)
        try:
            yield _Here()
        finally:
            _remember()
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin_worker, state)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Here(Executor):
    """This process alone, at once."""

    def submit(self, work, /, *arguments) -> Future:
        future = Future()
        future.set_result(work(*arguments))
        return future

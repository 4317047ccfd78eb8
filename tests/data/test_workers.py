"""A data worker that dies or hangs is told with the sample that it was at, and none is left."""

import os
import signal
import time
from dataclasses import replace
from multiprocessing import active_children, get_context

import pytest

from tests.data.test_loader import BEGIN, make_dataset, taken, write_data
from vlm.data.loader import StepDataset, open_loader
from vlm.data.watch import DataWorkerError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


class Trapped:
    """A processor that does something else at one sample."""

    def __init__(self, processor, id: str, act) -> None:
        self.processor, self.id, self.act = processor, id, act
        self.config = processor.config

    def encode(self, sample, features=None):
        if sample.id.endswith(self.id):
            self.act()
        return self.processor.encode(sample, features)


def trapped(folder, act) -> StepDataset:
    dataset = make_dataset(folder)
    return replace(dataset, processor=Trapped(dataset.processor, "data.jsonl:7", act))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_told_with_its_sample(folder, workers):
    dataset = trapped(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataWorkerError, match=r"killed.* while it read .*data\.jsonl:7"):
        taken(dataset, workers=workers)
    assert not active_children()


@pytest.mark.parametrize("stop", [lambda: time.sleep(1e6), lambda: os.kill(os.getpid(), 19)])
def test_a_stuck_worker_is_told_with_its_sample_and_ended(folder, stop):
    """Asleep for ever, or stopped (SIGSTOP), which no polite signal ends."""
    message = r"no data came in time.*data\.jsonl:7 \(since \d+ s\).*dataloader_timeout"
    with pytest.raises(DataWorkerError, match=message):
        taken(trapped(folder, stop), workers=2, timeout=2)
    assert not active_children()


def test_an_error_of_the_loop_leaves_no_worker(folder):
    with pytest.raises(KeyboardInterrupt), open_loader(make_dataset(folder), BEGIN, 2) as loader:
        next(loader)
        raise KeyboardInterrupt
    assert not active_children()


def _ends_while_its_event_is_held(folder) -> None:
    with open_loader(make_dataset(folder), BEGIN, 1) as steps:
        next(steps)
        steps._workers_done_event._cond.acquire()  # as a worker may that is killed just then


def test_a_worker_that_is_killed_with_a_lock_holds_nobody_up(folder):
    process = get_context("fork").Process(target=_ends_while_its_event_is_held, args=(folder,))
    process.start()
    process.join(30)
    held_up = process.is_alive()
    process.kill()
    process.join()
    assert not held_up

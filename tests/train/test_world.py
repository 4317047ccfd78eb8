"""What one rank raises, every rank raises: errors on their way to another process."""

import pickle

import pytest

from train.config import UsageError
from train.world import World, portable
from vlm.data.ledger import TooManyBadSamples
from vlm.data.schema import BadSample
from vlm.data.sources import DataError
from vlm.data.watch import DataWorkerError


class Response(Exception):
    """As of a hub's client: it wants what a pickle does not hand it."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Held(Exception):
    """It holds what cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.work = lambda: None


@pytest.mark.parametrize("kind", [UsageError, DataError, DataWorkerError, TooManyBadSamples])
def test_our_own_errors_arrive_as_they_are(kind):
    error = portable(kind("one sentence"))
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind and str(arrived) == "one sentence"


def test_a_bad_sample_arrives_with_its_name_and_reason():
    error = BadSample("data.jsonl:7", "has\nno answer \udcff")
    arrived = pickle.loads(pickle.dumps(portable(error)))
    assert type(arrived) is BadSample and str(arrived) == str(error)
    assert (arrived.sample_id, arrived.reason) == (error.sample_id, error.reason)


@pytest.mark.parametrize("error", [Response("not found", status=404), Held("not found")], ids=repr)
def test_an_error_that_cannot_travel_is_told_in_words(error):
    arrived = pickle.loads(pickle.dumps(portable(error)))
    assert type(arrived) is RuntimeError
    assert str(arrived) == f"{type(error).__name__}: not found"


@pytest.mark.parametrize("call", ["from_first", "together"])
def test_what_is_sent_of_an_error_can_be_sent(monkeypatch, call):
    """The first of two ranks, with groups that pickle as torch's do."""
    world = World(0, 2, None, launched=False)

    def broadcast(items: list, **_) -> None:
        items[:] = pickle.loads(pickle.dumps(items))

    def gather(lists: list, items: list, **_) -> None:
        lists[0] = pickle.loads(pickle.dumps(items))

    monkeypatch.setattr("train.world.dist.broadcast_object_list", broadcast)
    monkeypatch.setattr("train.world.dist.all_gather_object", gather)

    def fail() -> None:
        raise Held("not found")

    with pytest.raises(RuntimeError, match="Held: not found"):
        getattr(world, call)(fail)


@pytest.mark.parametrize("call", ["from_first", "together"])
def test_alone_an_error_stays_what_it_is(call):
    world = World(0, 1, None, launched=False)

    def fail() -> None:
        raise Held("not found")

    with pytest.raises(Held):
        getattr(world, call)(fail)

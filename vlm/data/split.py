"""Which samples are held out: a share of each source, so that nothing of them is trained on.

Samples with an image or video in common stand on one side, and so do equal texts: data sets ask
several questions about one image, and repeat rows.
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256

import numpy as np

from vlm.data.schema import Sample


def related(samples: Iterable[Sample]) -> np.ndarray:
    """(n,) int64: the number of each sample's group.

    Two samples are of one group where they have a medium in common (a file of the same path, or
    the same bytes) or are the same text without media, or where a chain of others links them.
    """
    parents: list[int] = []
    met: dict[bytes, int] = {}

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    for number, sample in enumerate(samples):
        parents.append(number)
        for key in _keys(sample):
            parents[root(number)] = root(met.setdefault(key, number))
    return np.array([root(number) for number in range(len(parents))], np.int64)


def _keys(sample: Sample) -> Iterator[bytes]:
    """What no two groups share."""
    media = [*sample.images]
    for video in sample.videos:
        media += video if isinstance(video, tuple) else [video]
    for content in media or [sample.messages]:
        content = content if isinstance(content, bytes) else repr(content).encode()
        yield sha256(content).digest()


def choose_held_out(groups: np.ndarray, source: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(k,) int64, rising: the samples to hold out, whole groups in the seed's order.

    Args:
        groups: (n,) as `related` has them; source: (n,) number of each sample's source.
        share: of each source's samples, in 0..1; no source gives more, and one may give less
            where a group would not fit.
    """
    room = np.floor(share * np.bincount(source))
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    chosen = [order[:0]]
    for number in np.random.default_rng(seed).permutation(len(members)):
        takes = np.bincount(source[members[number]], minlength=len(room))
        if (takes <= room).all():
            chosen.append(members[number])
            room -= takes
        if not room.any():
            break
    return np.sort(np.concatenate(chosen))


def strangers(groups: np.ndarray) -> np.ndarray:
    """(n,) int64: for each sample another one, of another group; empty where there is one group.

    Samples lie in a ring, group beside group, which is turned by the size of the largest. So
    each serves once, unless that one holds more than half of them.
    """
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=1)
    outside = order[groups[order] != sizes.argmax()]
    if not len(outside):
        return outside
    others = np.empty_like(order)
    others[order] = np.roll(order, sizes.max())
    return np.where(groups[others] == groups, np.resize(outside, len(groups)), others)

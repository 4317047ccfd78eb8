"""All measures of a source in one file, so that a start does not read data that did not change.

The chunk cache (`vlm/data/index_cache.py`) tells what is known by reading and hashing every row.
While the files of a source are the same by path, size, times and inode, that is not needed: a
snapshot, an `.npz` beside the chunk cache, holds the source's places, measures and bad rows. It is
keyed by the processor and by what else decides which rows and media are meant: the limit and the
directories that paths are relative to.

Bad rows are measured again at each start, since a missing image may be there by now. Of the samples
with media in files only SAMPLED are looked at, so that a start takes as long for any number of
them; where one was replaced, the chunk cache finds all that were. A few replaced files among many
are thus planned as they were, until the data file changes or `python -m vlm.data.index --rebuild`;
the loader finds them at decoding, and leaves out those whose size is another.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import time_ns

import numpy as np

from vlm.data.index_cache import Measures, cache_path, media_stamp, write_arrays
from vlm.data.processor import Processor
from vlm.data.schema import BadSample
from vlm.data.sources import Place, Source

SAMPLED = 256
"""Samples with media in files that are looked at, evenly spread: enough to find, mostly, that 1 %
were replaced (1 - 0.99^256 = 92 %), the share of bad samples that ends a run by default."""
SETTLED_NS = 2 * 10**9
"""A file that changed so recently may change again without another time: file systems count in
steps of up to 2 s (FAT)."""


@dataclass(frozen=True)
class SourceMeasures:
    """What the index knows of one source. Legend: n good rows."""

    places: np.ndarray
    """(n, 3) int64: file, offset and line, as Place has them."""
    measures: Measures
    """Of the n."""
    bad: tuple[tuple[Place, str], ...]
    """Bad rows with their reasons."""


class Snapshot:
    """The snapshot of one source, as its files are now.

    Safe with several processes, and damage counts as absence, as in IndexCache. There is none
    without a folder, nor of rows that lie in no files.
    """

    def __init__(self, folder: Path | None, fingerprint: str, source: Source) -> None:
        """To be made before the rows are read, so that a change while they are is noticed.

        Args:
            fingerprint: `processor_fingerprint`.
        """
        self.source = source
        self.path: Path | None = None
        now = time_ns()
        self.states = _states(source.stored) if folder else []
        if not self.states:
            return
        newest = max(time for _, *times, _ in self.states for time in times)
        self.is_settled = newest + SETTLED_NS <= now
        paths = [str(path.resolve()) for path in source.stored]
        identity = repr((paths, source.limit, source.context.fingerprint()))
        name = sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
        self.chunks = cache_path(folder, fingerprint, source)
        self.path = self.chunks.with_name(f"{self.chunks.stem}-{name[:16]}.npz")

    def load(self, processor: Processor) -> SourceMeasures | None:
        """What was saved, if it still holds; None where the rows must be read."""
        known = self._load() if self.path else None
        if known is None or not self._holds(known, processor):
            return None
        for path in (self.path, self.chunks):  # those not used for longest are removed
            with suppress(OSError):
                os.utime(path)
        return known

    def save(self, known: SourceMeasures) -> None:
        """Keep what was measured, unless the files may have changed since this object was made."""
        if not self.path or not self.is_settled or _states(self.source.stored) != self.states:
            return
        bad = [[place.file, place.offset, place.line, reason] for place, reason in known.bad]
        told = json.dumps({"states": self.states, "bad": bad}).encode()
        with suppress(OSError):  # IndexCache, which writes to the same directory, warns
            write_arrays(
                self.path,
                told=np.frombuffer(told, np.uint8),
                places=known.places,
                **vars(known.measures),
            )

    def _load(self) -> SourceMeasures | None:
        try:
            with np.load(self.path, allow_pickle=False) as file:  # zip's checksums tell damage
                told = json.loads(file["told"].tobytes())
                if told["states"] != self.states:
                    return None
                columns = {name: file[name] for name in file.files if name != "told"}
            bad = tuple((Place(*place), reason) for *place, reason in told["bad"])
            return SourceMeasures(columns.pop("places"), Measures(**columns), bad)
        except Exception:  # noqa: BLE001 - one that cannot be used, for whatever reason, is none
            return None

    def _holds(self, known: SourceMeasures, processor: Processor) -> bool:
        """Whether the bad rows are as bad as they were, and the media looked at are the same."""
        for place, reason in known.bad:
            try:
                processor.measure(self.source.read(place))
                return False
            except BadSample as error:
                if error.reason != reason:
                    return False
        stamps = known.measures.stamp
        with_files = np.flatnonzero(stamps)
        for number in with_files[:: max(1, -(-len(with_files) // SAMPLED))]:
            try:
                sample = self.source.read(Place(*known.places[number].tolist()))
                if media_stamp(sample) != stamps[number]:
                    return False
            except (BadSample, OSError, ValueError):
                return False
        return True


def _states(paths: Sequence[Path]) -> list[list[int]]:
    """Size, times of change of content and of anything (nanoseconds), and inode of each file;
    empty where one is gone."""
    try:
        found = [path.stat() for path in paths]
    except OSError:
        return []
    return [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for stat in found]

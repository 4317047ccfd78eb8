"""The ledger of bad samples: each recorded once, with the reason and what was done."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path


class TooManyBadSamples(ValueError):
    """More bad samples than the run accepts."""


@dataclass(frozen=True)
class Entry:
    id: str
    """`file:line`."""
    reason: str
    found: str
    """`index` or, of a stream, `reading` (both from headers and text); `decoding`; or, of held-out
    data, EVALUATION."""
    action: str = "skipped"


EVALUATION = "evaluation"
"""Where samples are found that are recorded but never end a run."""


class Ledger:
    """`ledger.jsonl` of a run, which keeps all that was ever found.

    What an earlier start found at indexing counts no more: it is found again, or was mended.
    """

    def __init__(self, path: Path, writes: bool = True, strict: bool = False) -> None:
        """
        Args:
            writes: False on all ranks but one; every rank records the same entries.
            strict: `check` accepts no bad sample at all of those found since.
        """
        self.path, self.writes, self.strict = path, writes, strict
        self.entries: dict[str, Entry] = {}
        """Those that count, by id."""
        self.written: set[tuple[str, str]] = set()
        """Id and reason of all in the file."""
        self.first: Entry | None = None
        """Of those recorded since."""
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            for line in lines:
                if line.endswith("\n"):  # a kill, or the first rank at work, leaves a torn end
                    entry = Entry(**json.loads(line))
                    self.written.add((entry.id, entry.reason))
                    if entry.found not in ("index", EVALUATION):
                        self.entries[entry.id] = entry
            if writes and lines and not lines[-1].endswith("\n"):
                path.write_text("".join(lines[:-1]), encoding="utf-8")

    def record(self, entries: list[Entry]) -> None:
        """Count the entries, but for held-out data's, and append those that are new."""
        found = {entry.id: entry for entry in entries}
        counted = {id: entry for id, entry in found.items() if entry.found != EVALUATION}
        self.first = self.first or next(iter(counted.values()), None)
        self.entries |= counted
        new = [e for e in found.values() if (e.id, e.reason) not in self.written]
        self.written |= {(entry.id, entry.reason) for entry in new}
        if new and self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                for entry in new:
                    file.write(json.dumps(asdict(entry)) + "\n")

    def check(self, samples: int, max_bad_fraction: float) -> None:
        """TooManyBadSamples, with a summary, where the share of bad ones is too large; where the
        ledger is strict, with the first one.

        Args:
            samples: all samples of the data, good and bad.
        """
        bad = len(self.entries)
        later = any(entry.found != "index" for entry in self.entries.values())
        advice = "; mend the samples and delete that file" if later else ""
        if self.first and self.strict:
            raise TooManyBadSamples(
                f"{self.first.id}: {self.first.reason}; on_bad is error, so the run stops; "
                "mend or remove the sample, or use on_bad skip"
            )
        if bad > max_bad_fraction * samples:
            first = next(iter(self.entries.values()))
            kinds = Counter(entry.found for entry in self.entries.values())
            found = ", ".join(f"{count} at {kind}" for kind, count in kinds.items())
            raise TooManyBadSamples(
                f"{bad} of {samples} samples are bad ({found}), more than max_bad_fraction "
                f"{max_bad_fraction:g} allows; the first: {first.id}: {first.reason}"
                + (f"; all are in {self.path}{advice}" if self.writes else "")
            )

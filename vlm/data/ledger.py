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
    """`index` or, of a stream, `reading` (both from headers and text); or `decoding`."""
    action: str = "skipped"


class Ledger:
    """`ledger.jsonl` of a run. Reading it back makes a restarted run skip the same samples."""

    def __init__(self, path: Path, writes: bool = True, strict: bool = False) -> None:
        """
        Args:
            writes: False on all ranks but one; every rank records the same entries.
            strict: `check` accepts no bad sample at all.
        """
        self.path, self.writes, self.strict = path, writes, strict
        self.entries: dict[str, Entry] = {}
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            for line in lines:
                if line.endswith("\n"):  # a kill, or the first rank at work, leaves a torn end
                    entry = Entry(**json.loads(line))
                    self.entries[entry.id] = entry
            if writes and lines and not lines[-1].endswith("\n"):
                path.write_text("".join(lines[:-1]), encoding="utf-8")

    def record(self, entries: list[Entry]) -> None:
        """Append the entries that are new."""
        new = {entry.id: entry for entry in entries if entry.id not in self.entries}
        self.entries |= new
        if new and self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                for entry in new.values():
                    file.write(json.dumps(asdict(entry)) + "\n")

    def check(self, samples: int, max_bad_fraction: float) -> None:
        """TooManyBadSamples, with a summary, where the share of bad ones is too large; where the
        ledger is strict, with the first one.

        Args:
            samples: all samples of the data, good and bad.
        """
        bad = len(self.entries)
        if bad and self.strict:
            first = next(iter(self.entries.values()))
            raise TooManyBadSamples(
                f"{first.id}: {first.reason}; on_bad is error, so the run stops; mend or remove "
                "the sample, or use on_bad skip"
            )
        if bad > max_bad_fraction * samples:
            first = next(iter(self.entries.values()))
            kinds = Counter(entry.found for entry in self.entries.values())
            found = ", ".join(f"{count} at {kind}" for kind, count in kinds.items())
            raise TooManyBadSamples(
                f"{bad} of {samples} samples are bad ({found}), more than max_bad_fraction "
                f"{max_bad_fraction:g} allows; the first: {first.id}: {first.reason}; all are "
                f"in {self.path}"
            )

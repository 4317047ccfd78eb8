"""Sources in JSON: a sample a line (.jsonl), or an array of samples (.json)."""

import json
import mmap
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from zlib import crc32

from vlm.data.formats import parse_line
from vlm.data.formats.context import RowContext
from vlm.data.schema import BadSample, Sample
from vlm.data.sources import CHUNK_BYTES, CHUNK_ROWS, MOST_ROWS, Chunk, DataError, Place

MOST_BYTES = 64 * 2**20
"""Of a row. What is longer is surely no sample, and would fill the memory of every worker."""
WINDOWS = (2**14, 2**18, 2**22, MOST_BYTES)
"""Bytes of an array in which the end of an element is looked for, one after the other."""
TORN = 16
"""Bytes: a literal or an escape at the end of a window may be cut, and no larger thing."""
DECODER = json.JSONDecoder()
BOM = b"\xef\xbb\xbf"
SPACE = re.compile(rb"\s*")
SCALAR = re.compile(rb'[^\s,\[\]{}"]+')
STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}"]', re.DOTALL)
"""A whole string, a bracket, or the quote of a string without an end."""

Row = tuple[Place, bytes]


@dataclass(frozen=True)
class JsonSource(ABC):
    """What both have in common: a file whose rows are pieces of JSON."""

    name: str
    weight: float
    path: Path
    limit: int | None
    context: RowContext

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def stored(self) -> tuple[Path, ...]:
        return self.files

    def chunks(self) -> Iterator[Chunk]:
        return _chunks(islice(self._rows(), self.limit), self.context)

    def parse(self, row: bytes, place: Place) -> Sample:
        sample_id = f"{self.path}:{place.line}"
        if len(row) > MOST_BYTES:
            most = f"{MOST_BYTES >> 20} MiB"
            raise BadSample(sample_id, f"more than {most} of JSON; save its media as files")
        return parse_line(row, sample_id, self.context)

    @abstractmethod
    def read(self, place: Place) -> Sample: ...

    @abstractmethod
    def _rows(self) -> Iterator[Row]: ...


class LineSource(JsonSource):
    """One JSON object a line. Blank lines are skipped, and counted."""

    def read(self, place: Place) -> Sample:
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return self.parse(file.readline(MOST_BYTES + 1), place)

    def _rows(self) -> Iterator[Row]:
        offset = line = 0
        with self.path.open("rb") as file:
            while row := file.readline(MOST_BYTES + 1):
                line += 1
                if row.strip():
                    yield Place(0, offset, line), row
                while len(row) > MOST_BYTES and not row.endswith(b"\n"):
                    row = file.readline(MOST_BYTES + 1)  # the rest of a line that is too long
                offset = file.tell()


class ArraySource(JsonSource):
    """One JSON array. It is never held in memory: its elements are found by their brackets."""

    def read(self, place: Place) -> Sample:
        with _mapped(self.path) as text:
            end = _value_end(text, place.offset)
            if end is None:
                raise BadSample(f"{self.path}:{place.line}", "the file has changed since")
            return self.parse(_cut(text, place.offset, end), place)

    def _rows(self) -> Iterator[Row]:
        with _mapped(self.path) as text:
            start = len(BOM) if text[: len(BOM)] == BOM else 0
            position = SPACE.match(text, start).end() + 1  # behind the bracket
            for number in count():
                position = SPACE.match(text, position).end()
                if number == 0 and text[position : position + 1] == b"]":
                    return
                end = _value_end(text, position)
                if end is None:
                    raise self._damage(number, position)
                yield Place(0, position, number), _cut(text, position, end)
                position = SPACE.match(text, end).end() + 1
                separator = text[position - 1 : position]
                if separator == b"]":
                    return
                if separator != b",":
                    raise self._damage(number, position)

    def _damage(self, number: int, position: int) -> DataError:
        return DataError(
            f"{self.path}: the JSON array is damaged or cut off in element {number}, at byte "
            f"{position}; repair it, or save one object a line as .jsonl"
        )


def open_json(
    path: Path, name: str, weight: float, limit: int | None, context: RowContext
) -> LineSource | ArraySource:
    """The source in a `.json` file: an array, or after all one object a line.

    Raises:
        DataError: it is neither.
    """
    with path.open("rb") as file:
        start = file.read(2**16).removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        return ArraySource(name, weight, path, limit, context)
    first = start.partition(b"\n")[0].rstrip()
    if not first.startswith(b"{") or (b"\n" in start and not first.endswith(b"}")):
        raise DataError(f"{path} is neither a JSON array of samples nor one JSON object a line")
    return LineSource(name, weight, path, limit, context)


def _chunks(rows: Iterator[Row], context: RowContext) -> Iterator[Chunk]:
    """The rows of one file in chunks of bounded size."""
    chunk: list[Row] = []
    size = 0
    for place, row in rows:
        chunk.append((place, row))
        size += len(row)
        # by content: a row put in before leaves the chunks behind it as they were
        if crc32(row) % CHUNK_ROWS == 0 or len(chunk) == MOST_ROWS or size > CHUNK_BYTES:
            yield _chunk(chunk, context)
            chunk, size = [], 0
    if chunk:
        yield _chunk(chunk, context)


def _chunk(chunk: list[Row], context: RowContext) -> Chunk:
    places, rows = zip(*chunk, strict=True)
    content = sha256(context.fingerprint())
    for row in rows:
        content.update(len(row).to_bytes(8, "little") + row)
    return Chunk(places[0].file, places, rows, content.digest())


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _cut(text: mmap.mmap, start: int, end: int) -> bytes:
    return text[start : min(end, start + MOST_BYTES + 1)]


def _value_end(text: mmap.mmap, start: int) -> int | None:
    """Where the JSON value that begins at `start` ends; None where it does not."""
    if scalar := SCALAR.match(text, start):
        return scalar.end()
    for size in WINDOWS:
        window = text[start : start + size]
        try:
            # one character a byte, so that the decoder counts bytes; only the end is of interest
            _, end = DECODER.raw_decode(window.decode("latin-1"))
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated string") or error.pos > size - TORN
            if not is_cut:
                break
            continue
        except (ValueError, RecursionError):  # a number too long, brackets too deep
            break
        if end < size:
            return start + end
    return _closing_bracket(text, start)


def _closing_bracket(text: mmap.mmap, start: int) -> int | None:
    """The same for a value that is no JSON: by its brackets, ten times slower."""
    depth = 0
    for token in STRUCTURE.finditer(text, start):
        mark = token.group()
        if mark == b'"' or (depth == 0 and token.start() != start):
            return None
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        if depth <= 0:
            return token.end() if depth == 0 else None
    return None

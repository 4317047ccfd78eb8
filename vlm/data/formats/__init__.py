"""Accepted formats of training data, each of which becomes a Sample; `docs/data.md` shows them.

A row's own keys tell its format. The others are put into ms-swift's (`messages.py`), so that
weights, tools, boxes and checks are the same for all.
"""

import json

from vlm.data.formats.context import RowContext
from vlm.data.formats.llava import from_llava
from vlm.data.formats.messages import parse_row as parse_messages
from vlm.data.formats.query import from_alpaca, from_query
from vlm.data.schema import BadSample, Sample

FORMATS = {"conversations": from_llava, "query": from_query, "instruction": from_alpaca}
"""The key by which a row is known to be of a format, and what puts it into ms-swift's."""


def parse_line(line: str | bytes, sample_id: str, context: RowContext) -> Sample:
    """A Sample from one line of JSON; BadSample says what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        # a line number in it would be of the row, beside the file's own
        where = f"{error.msg} at character {error.pos + 1}"
        raise BadSample(sample_id, f"not a line of JSON ({where})") from None
    except (ValueError, RecursionError) as error:
        raise BadSample(sample_id, f"not a line of JSON ({error!s:.200})") from None
    return parse_row(row, sample_id, context)


def parse_row(row: object, sample_id: str, context: RowContext) -> Sample:
    """A Sample from a row of any accepted format; BadSample says what is wrong with it."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise BadSample(sample_id, f"no list of messages, and no object either but a {kind}")
    if row.get("messages") is None:
        known = [key for key in FORMATS if row.get(key) is not None]
        if not known:
            keys = ", ".join(sorted(map(str, row))[:10]) or "none"
            raise BadSample(
                sample_id,
                f"no list of messages, nor {', '.join(FORMATS)}, by one of which a format is "
                f"known; its keys: {keys}",
            )
        row = FORMATS[known[0]](row, sample_id)
    return parse_messages(_in_lists(row, sample_id), sample_id, context)


def _in_lists(row: dict, sample_id: str) -> dict:
    """The row with `image` and `video`, one or several, under `images` and `videos`."""
    for one, many in (("image", "images"), ("video", "videos")):
        value = row.get(one)
        if value is None:
            continue
        if row.get(many):
            raise BadSample(sample_id, f"has both {one} and {many}; use one of them")
        row = {**row, many: value if isinstance(value, list) else [value]}
    return row

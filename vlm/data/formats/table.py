"""Rows of tables (Parquet, Arrow): what they hold otherwise than a line of JSON does."""

import json

NESTED = ("messages", "conversations", "history", "images", "videos", "objects", "tools")
"""Columns that may be the text of JSON, since a table's columns are of one type each."""
TURNS = ("messages", "conversations")


def plain_row(row: dict) -> dict:
    """The row as a line of JSON would have it.

    Keys without a value go: a table cannot leave a key out, and nothing in our formats differs
    between null and absent. A column of turns may be one list for each key (the `Sequence` of older
    versions of `datasets`).
    """
    plain = _without_nulls(row)
    for key in NESTED:
        value = plain.get(key)
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
            plain[key] = _decode(value)
    for key in TURNS:
        value = plain.get(key)
        if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
            counts = {len(column) for column in value.values()}
            if len(counts) == 1:
                turns = zip(*value.values(), strict=True)
                plain[key] = [dict(zip(value, turn, strict=True)) for turn in turns]
    return plain


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _decode(text: str) -> object:
    """What the JSON holds, or the text itself, which the format then refuses."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text

"""Data in every kind of source, for these tests, and all that a source gives."""

import json
import pickle

from tests.data.samples import row, write_jsonl
from vlm.data.schema import BadSample

ROWS = [row(f"question {number}", "answer " * (number % 7 + 1)) for number in range(600)]
KINDS = [
    "jsonl",
    "lines.json",
    "json",
    "indented.json",
    "parquet",
    "arrow",
    "saved",
    "splits",
    "folder",
    "json_folder",
]


def text_rows(rows):
    """Without empty lists, of whose type a table knows nothing."""
    return [{"messages": row["messages"]} for row in rows]


def write_kind(folder, kind, rows=ROWS):
    """The rows in a file or directory of some kind; its path."""
    import datasets

    rows = text_rows(rows)
    table = datasets.Dataset.from_list(rows)
    path = folder / f"data.{kind}"
    match kind:
        case "jsonl":
            write_jsonl(path, rows)
        case "lines.json":
            write_jsonl(path, rows)
        case "json":
            path.write_text(json.dumps(rows))
        case "indented.json":
            path.write_text("\ufeff \n" + json.dumps(rows, indent=2) + "\n\n", encoding="utf-8")
        case "parquet":
            table.to_parquet(path)
        case "arrow":
            table.save_to_disk(folder / "saved")
            (folder / "saved" / "data-00000-of-00001.arrow").rename(path)
        case "saved":
            table.save_to_disk(path)
        case "splits":
            parts = {"train": table, "test": table.select(range(5))}
            datasets.DatasetDict(parts).save_to_disk(path)
        case "folder":  # as a hub has it
            path.mkdir()
            half = len(table) // 2
            table.select(range(half)).to_parquet(path / "train-00000-of-00002.parquet")
            rest = table.select(range(half, len(table)))
            rest.to_parquet(path / "train-00001-of-00002.parquet")
            table.select(range(5)).to_parquet(path / "test-00000-of-00001.parquet")
        case "json_folder":
            path.mkdir()
            write_jsonl(path / "train.jsonl", rows)
    return path


def walk(source):
    """(place, sample) of all rows, each read alone too; a bad one as its reason."""
    found = []
    for chunk in source.chunks():
        chunk = pickle.loads(pickle.dumps(chunk))
        assert len(chunk.places) == len(chunk.rows) <= 512
        for place, raw in zip(chunk.places, chunk.rows, strict=True):
            assert place.file == chunk.file == 0
            outcomes = []
            for way in (lambda r=raw, p=place: source.parse(r, p), lambda p=place: source.read(p)):
                try:
                    outcomes.append(way())
                except BadSample as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]
            found.append((place, outcomes[0]))
    return found

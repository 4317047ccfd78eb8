"""Tables: images as they are stored, nulls, splits."""

import json

import pytest

from tests.data.data_files import ROWS, text_rows, walk, write_kind
from tests.data.samples import assistant, processor, user, write_image
from vlm.data.sources import DataError, open_sources

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    datasets.disable_progress_bars()


def pixels(sample):
    return processor().encode(sample).patches


def test_images_in_tables_are_bytes_or_paths(tmp_path):
    name = write_image(tmp_path / "a.png", 40, 56)
    content = (tmp_path / name).read_bytes()
    columns = {
        "messages": [[user("<image>what?"), assistant("a")]],
        "images": [[{"bytes": content, "path": "elsewhere.png"}]],
    }
    image = datasets.Image()
    kinds = {
        "struct": columns,
        "bytes": {**columns, "images": [[content]]},
        "one": {"messages": columns["messages"], "image": [content]},
        "path": {**columns, "images": [[name]]},
        "struct_path": {**columns, "images": [[{"bytes": None, "path": name}]]},
        "text": {**columns, "messages": [json.dumps(columns["messages"][0])]},
        "json_paths": {**columns, "images": [json.dumps([name])]},
    }
    (tmp_path / "line.jsonl").write_text(
        json.dumps({"messages": columns["messages"][0], "images": [name]})
    )
    expected = pixels(walk(open_sources([str(tmp_path / "line.jsonl")])[0])[0][1])
    for kind, table in kinds.items():
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"{kind}.parquet")
        (source,) = open_sources([str(tmp_path / f"{kind}.parquet")])
        assert pixels(walk(source)[0][1]).equal(expected), kind
    decoded = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(image))
    decoded.save_to_disk(tmp_path / "decoded")
    decoded.to_parquet(tmp_path / "decoded.parquet")
    for path in ("decoded", "decoded.parquet"):
        sample = walk(open_sources([str(tmp_path / path)])[0])[0][1]
        assert sample.images == (content,)  # as they were encoded


def test_rows_of_tables_are_bad_one_by_one(tmp_path):
    table = {
        "messages": [None, [], text_rows(ROWS)[0]["messages"], [user("a"), {"role": None}]],
        "images": [None, None, None, [b"x"]],
    }
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "data.parquet")
    found = [outcome for _, outcome in walk(open_sources([str(tmp_path / "data.parquet")])[0])]
    assert "no list of messages" in found[0]
    assert found[0].startswith(f"{tmp_path / 'data.parquet'}:0: ")
    assert "messages is empty" in found[1]
    assert found[2].messages[0].content == "question 0"
    assert "message 1 has no role" in found[3]


def test_a_table_here_calls_its_samples_as_the_index_does(tmp_path, monkeypatch):
    write_kind(tmp_path, "parquet", ROWS[:2])
    monkeypatch.chdir(tmp_path)
    (source,) = open_sources(["./data.parquet"])
    assert walk(source)[1][1].id == "data.parquet:1" == f"{source.files[0]}:1"


def test_splits_are_chosen_by_name(tmp_path):
    path = str(write_kind(tmp_path, "splits"))
    (source,) = open_sources([{"path": path, "split": "test"}])
    found = walk(source)
    assert len(found) == 5
    assert found[0][1].id == f"{path}/test:0"
    with pytest.raises(DataError, match="no split 'val'; set split to one of train, test"):
        open_sources([{"path": path, "split": "val"}])
    table = datasets.Dataset.from_list(text_rows(ROWS))
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "several")
    with pytest.raises(DataError, match="no split 'train'; set split to one of a, b"):
        open_sources([str(tmp_path / "several")])
    datasets.DatasetDict({"a": table}).save_to_disk(tmp_path / "only")
    assert len(walk(open_sources([str(tmp_path / "only")])[0])) == 600
    saved = str(write_kind(tmp_path, "saved"))
    with pytest.raises(DataError, match="has no splits; leave 'train' out"):
        open_sources([{"path": saved, "split": "train"}])

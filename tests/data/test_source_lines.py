"""JSON: lines and arrays, whole, strange and damaged."""

import json

import pytest

from tests.data.data_files import ROWS, walk, write_kind
from tests.data.samples import row
from vlm.data import source_lines
from vlm.data.schema import BadSample
from vlm.data.sources import DataError, open_sources


def test_lines_may_be_blank_or_end_as_on_windows(tmp_path):
    lines = [json.dumps(row(text)).encode() for text in "abc"]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n  \n" + lines[1] + b"\r\n" + lines[2])
    found = walk(open_sources([str(path)])[0])
    assert [place.line for place, _ in found] == [1, 4, 5]
    assert [sample.messages[0].content for _, sample in found] == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_row_that_is_too_long_is_bad_and_its_neighbours_stay(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(source_lines, "MOST_BYTES", 1000)
    monkeypatch.setattr(source_lines, "WINDOWS", (100, 1000))
    rows = [row("a"), row("x" * 5000), row("y" * 1000), row("b")]
    found = walk(open_sources([str(write_kind(tmp_path, kind, rows))])[0])
    assert [sample.messages[0].content for _, sample in (found[0], found[3])] == ["a", "b"]
    assert all("more than 0 MiB of JSON" in reason for _, reason in found[1:3])
    first = found[0][0].line
    assert [place.line for place, _ in found] == [first, first + 1, first + 2, first + 3]


STRANGE = [
    b"[1, [2, {}]]",
    b'"text, with ] and \\" and \\\\"',
    b"5",
    b"null",
    b"NaN",
    b"-1.5e3",
    b'{"a": "\n"}',
    b'{"a": "\xff"}',
    b'{"a": "\\ud800 ]"}',
    b"{}",
    b"[" * 5000 + b"]" * 5000,
    b"1" * 5000,
    b'{"a": ' + b"1" * 5000 + b"}",
    b"{'a': 1}",
]


@pytest.mark.parametrize("windows", [(3, 2**20), (2**14,), (1,)])
def test_strange_elements_of_an_array_are_bad_one_by_one(tmp_path, monkeypatch, windows):
    monkeypatch.setattr(source_lines, "WINDOWS", windows)
    good = json.dumps(row('a "quoted" ] , } \\ é 猫 text'), ensure_ascii=False).encode()
    elements = [good] + [element for strange in STRANGE for element in (strange, good)]
    path = tmp_path / "data.json"
    path.write_bytes(b"\n[ " + b" ,\n".join(elements) + b"\t]")
    found = walk(open_sources([str(path)])[0])
    assert len(found) == len(elements)
    for number, (place, outcome) in enumerate(found):
        assert place.line == number
        if number % 2:
            assert outcome.startswith(f"{path}:{number}: ")
        else:
            assert outcome.messages[0].content == 'a "quoted" ] , } \\ é 猫 text'


@pytest.mark.parametrize("text", ["[]", " [ ] "])
def test_an_empty_array_has_no_rows(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    assert walk(open_sources([str(tmp_path / "data.json")])[0]) == []


@pytest.mark.parametrize(
    "text", ["[", "[{}", "[{},", "[{},]", "[{} {}]", '[{"a": "]', "[{}}", "[{]", "[,{}]", "[{}, {"]
)
def test_a_damaged_array_is_refused_where_it_breaks(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    (source,) = open_sources([str(path)])
    with pytest.raises(DataError, match=r"data\.json: the JSON array is damaged or cut off in ele"):
        list(source.chunks())


def test_an_array_that_has_changed_is_a_bad_sample(tmp_path):
    path = write_kind(tmp_path, "json", ROWS[:5])
    (source,) = open_sources([str(path)])
    place = walk(source)[4][0]
    path.write_bytes(path.read_bytes()[: place.offset + 5])
    with pytest.raises(BadSample, match=r"data\.json:4: the file has changed"):
        source.read(place)

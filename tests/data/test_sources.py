"""Sources: every kind gives the same samples, walked through and read alone."""

import pytest

from tests.data.data_files import KINDS, ROWS, walk, write_kind
from tests.data.samples import row, write_jsonl
from vlm.data import source_lines, source_tables
from vlm.data.sources import DataError, SourceSpec, open_sources, parse_spec

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_all_rows_in_order(tmp_path, kind):
    path = write_kind(tmp_path, kind)
    (source,) = open_sources([str(path)])
    found = walk(source)
    first = 1 if kind in ("jsonl", "lines.json") else 0
    assert [place.line for place, _ in found] == list(range(first, first + 600))
    texts = [sample.messages[0].content for _, sample in found]
    assert texts == [f"question {number}" for number in range(600)]
    assert [sample.id for _, sample in found[:2]] == [f"{path}:{first}", f"{path}:{first + 1}"]
    assert source.files == (path,)
    assert source.name == path.stem and source.weight == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_takes_the_first_rows(tmp_path, kind):
    path = write_kind(tmp_path, kind, ROWS[:10])
    (source,) = open_sources([f"{path}#3"])
    assert [sample.messages[0].content for _, sample in walk(source)] == [
        f"question {number}" for number in range(3)
    ]
    (source,) = open_sources([f"{path}#300"])
    assert len(walk(source)) == 10


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_a_chunks_digest_is_that_of_its_content_and_of_where_paths_lead(tmp_path, kind):
    def digests(rows, folder="a", **options):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = write_kind(tmp_path / folder, kind, rows)
        (source,) = open_sources([str(path)], **options)
        found = [chunk.digest for chunk in source.chunks()]
        assert found == [chunk.digest for chunk in source.chunks()]
        return found

    changed = [*ROWS[:300], row("other", "answer"), *ROWS[301:]]
    before, after = digests(ROWS), digests(changed, "a" if kind != "folder" else "b")
    assert len(before) == len(after) >= 2
    if kind != "folder":  # which lies elsewhere, so that all differ
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert set(digests(ROWS, "b")).isdisjoint(before)
        assert set(digests(ROWS, media_root=tmp_path)).isdisjoint(before)
    assert set(before).isdisjoint(set(after)) == (kind == "folder")


def test_large_rows_make_small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(source_lines, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(source_tables, "CHUNK_BYTES", 20_000)
    rows = [row("x" * 9000) for _ in range(10)]
    for kind in ("jsonl", "json", "parquet"):
        (source,) = open_sources([str(write_kind(tmp_path, kind, rows))])
        assert 3 < len(list(source.chunks())) < 11
        assert len(walk(source)) == 10


def test_names_of_files_are_no_patterns(tmp_path):
    folder = tmp_path / "a[1] *é#b"
    folder.mkdir()
    for kind in ("jsonl", "json", "parquet", "saved"):
        assert len(walk(open_sources([str(write_kind(folder, kind, ROWS[:3]))])[0])) == 3


# --- what is opened, and what is refused ---------------------------------------------------------


def test_specs_say_the_same_on_a_line_and_in_a_mapping():
    assert parse_spec("a.jsonl") == SourceSpec("a.jsonl")
    assert parse_spec("a.jsonl#500") == SourceSpec("a.jsonl", limit=500)
    assert parse_spec("a#b.jsonl") == SourceSpec("a#b.jsonl")
    mapping = {"path": "a.jsonl", "name": "x", "weight": 2, "limit": 5, "hub": "modelscope"}
    assert parse_spec(mapping) == SourceSpec(**mapping)
    assert parse_spec(SourceSpec("a", weight=0.5)).weight == 0.5


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "path ''"),
        ("a.jsonl#0", "limit 0"),
        ({}, "path ''"),
        ({"path": "a", "wieght": 2}, "no 'wieght'; it may have path, name, weight"),
        ({"path": "a", "weight": 0}, "weight 0"),
        ({"path": "a", "weight": -1.0}, "weight -1"),
        ({"path": "a", "weight": float("nan")}, "weight nan"),
        ({"path": "a", "weight": float("inf")}, "weight inf"),
        ({"path": "a", "weight": 1e12}, "weight 1000000000000.0; .* at most 1000"),
        ("a.jsonl#99999999999999999999", "limit 99999999999999999999"),
        ({"path": "a", "weight": "2"}, "weight '2'"),
        ({"path": "a", "weight": True}, "weight True"),
        ({"path": "a", "limit": -5}, "limit -5"),
        ({"path": "a", "limit": 1.5}, "limit 1.5"),
        ({"path": "a", "hub": "github"}, "hub 'github'; use huggingface or modelscope"),
        ({"path": 5}, "path 5"),
        ({"path": "a", "name": ""}, "name ''"),
    ],
)
def test_specs_that_mean_nothing_are_refused(spec, reason):
    with pytest.raises(DataError, match=reason):
        parse_spec(spec)


def test_names_are_short_where_they_can_be_and_never_the_same(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_kind(tmp_path / name, "jsonl", ROWS[:2])
    a, b = (str(tmp_path / name / "data.jsonl") for name in "ab")
    assert [source.name for source in open_sources([a])] == ["data"]
    assert [source.name for source in open_sources([a, b])] == [a, b]
    named = open_sources([{"path": a, "name": "x"}, {"path": b, "weight": 3}])
    assert [(source.name, source.weight) for source in named] == [("x", 1), ("data", 3)]
    for same in ([a, a], [{"path": a, "name": "x"}, {"path": b, "name": "x"}]):
        with pytest.raises(DataError, match=r"two data sets are called .*; give each a name"):
            open_sources(same)


def test_each_source_may_have_a_media_root_of_its_own(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_jsonl(tmp_path / "data.jsonl", [row("<image>", images=["a.png"])])
    path = str(tmp_path / "data.jsonl")

    def image(spec, **options):
        return walk(open_sources([spec], **options)[0])[0][1].images[0]

    assert image(path) == tmp_path / "a.png"
    assert image(path, media_root=tmp_path / "pictures") == tmp_path / "pictures" / "a.png"
    own = {"path": path, "media_root": str(tmp_path / "pictures")}
    assert image(own, media_root=tmp_path) == tmp_path / "pictures" / "a.png"
    with pytest.raises(DataError, match=r"media_root .*absent is not a directory"):
        open_sources([path], media_root=tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.jsonl", "absent.jsonl does not exist"),
        ("absent", "absent does not exist"),
        ("a.jsonl.gz", "compressed, so no sample can be read alone; decompress it"),
        ("a.jsonl.zst", "decompress it"),
        ("a.csv", "of no known kind: only .jsonl, .json, .parquet and .arrow"),
        ("empty.json", "neither a JSON array of samples nor one JSON object a line"),
        ("one.json", "neither a JSON array"),
        ("text.json", "neither a JSON array"),
        ("torn.parquet", r"torn\.parquet cannot be opened as a data set \(\w+: "),
        ("folder", r"folder cannot be opened as a data set \(\w+: "),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(tmp_path, name, reason):
    for file in ("a.jsonl.gz", "a.jsonl.zst", "a.csv", "empty.json"):
        (tmp_path / file).touch()
    (tmp_path / "one.json").write_text('{\n"messages": []\n}')
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=reason) as error:
        open_sources([str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_a_file_has_no_splits_and_no_data_is_refused(tmp_path):
    path = str(write_kind(tmp_path, "jsonl", ROWS[:2]))
    with pytest.raises(DataError, match="one file, without splits"):
        open_sources([{"path": path, "split": "train"}])
    with pytest.raises(DataError, match="no data is named"):
        open_sources([])

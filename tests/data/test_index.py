"""The index is what the samples really take, however it is made, and says what it leaves out."""

import os
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import GOLDEN, index_of, processor, row, write_image, write_jsonl
from vlm.cost import PARTS, sample_flops
from vlm.data.index import build_index, main
from vlm.data.index_report import index_report
from vlm.data.ledger import Entry
from vlm.data.sources import SourceSpec, open_sources
from vlm.data.watch import DataWorkerError

COLUMNS = ("source", "file", "offset", "line", "length", "targets", "patches", "media", "grids")
ROOT = Path(__file__).parents[2]


def write_mixed(folder: Path, samples: int = 40) -> Path:
    """Texts with none to two images."""
    names = [write_image(folder / f"{n}.png", 56 + 28 * n, 84, n) for n in range(4)]
    rows = [
        row("<image>" * (n % 3) + f"q {'w ' * (n % 7)}", "a " * (1 + n % 5), names[: n % 3])
        for n in range(samples)
    ]
    return write_jsonl(folder / "mixed.jsonl", rows)


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


def test_costs_are_those_of_the_samples_one_by_one(tmp_path):
    ours = processor()
    index, bad = index_of([write_mixed(tmp_path)], ours)
    assert not bad and index.media.max() == 2
    for trains in ((), ("aligner",), PARTS):
        costs = index.costs(ours.config, trains)
        for number, cost in enumerate(costs):
            example = ours.encode(index.sample(number))
            targets = int((example.targets >= 0).sum())
            sizes = (example.length, example.grid_thw, targets)
            assert cost == sample_flops(ours.config, *sizes, trains)
            assert index.sample_id(number) == example.id


def test_several_processes_give_the_same(tmp_path):
    rows = [row(f"number {n}") if n % 7 else b"{" for n in range(600)]
    files = [write_jsonl(tmp_path / "data.jsonl", rows), write_mixed(tmp_path)]
    alone, several = (index_of(files, processor(), workers=workers) for workers in (1, 3))
    assert alone[1] == several[1] and len(alone[1]) == 86
    assert same(alone[0], several[0]) and alone[0].counts == (514, 40)
    assert not active_children()


def test_a_million_samples_with_an_image_each_take_46_megabytes(tmp_path):
    index, _ = index_of([write_mixed(tmp_path)], processor())
    columns = [getattr(index, name) for name in COLUMNS]
    assert sum(c[:1].nbytes for c in columns) == 34 + 12


def test_limits_weights_and_names_of_sources_arrive(tmp_path):
    path = str(write_mixed(tmp_path))
    specs = [SourceSpec(path, "few", 2.0, limit=5), SourceSpec(path, "all", 0.5)]
    index, _ = build_index(open_sources(specs), processor())
    assert index.counts == (5, 40) and index.weights == (2.0, 0.5)
    assert index.sample(5).id == index.sample(0).id == f"{path}:1"
    other, _ = build_index(open_sources([specs[0], SourceSpec(path, "all", 1.0)]), processor())
    assert same(index, other) and index.fingerprint() != other.fingerprint()


def test_arrays_and_tables_are_indexed_as_lines_are(tmp_path):
    pytest.importorskip("datasets")
    import json

    import pyarrow
    import pyarrow.parquet

    rows = [row(f"q {n}", "a " * n) for n in range(1, 9)]
    lines = write_jsonl(tmp_path / "lines.jsonl", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    table = pyarrow.Table.from_pylist([{"messages": r["messages"]} for r in rows])
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    expected, _ = index_of([lines], processor())
    for name, workers in (("array.json", 1), ("table.parquet", 1), ("table.parquet", 2)):
        index, bad = index_of([tmp_path / name], processor(), workers=workers)
        assert not bad
        assert index.length.tolist() == expected.length.tolist()
        assert index.sample(3).messages == expected.sample(3).messages
        assert index.sample(3).id == index.sample_id(3) == f"{tmp_path / name}:3"


class Counted:
    """A source that tells how many of its chunks were taken."""

    def __init__(self, source) -> None:
        self.source, self.taken = source, 0
        self.name, self.weight, self.files = source.name, source.weight, source.files

    def chunks(self):
        for chunk in self.source.chunks():
            self.taken += 1
            yield chunk

    def parse(self, raw, place):
        if b"die" in raw:
            assert self.taken < 20, "the file was read ahead of its measures"
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.parse(raw, place)


def test_a_killed_process_is_told_and_the_file_not_read_ahead(tmp_path):
    """A data file with images inside may be larger than the memory."""
    rows = [row("hi")] * 300 + [row("die")] + [row("hi")] * 256 * 40
    (source,) = open_sources([str(write_jsonl(tmp_path / "data.jsonl", rows))])
    counted = Counted(source)
    with pytest.raises(DataWorkerError, match=r"died, at or soon after .*data\.jsonl:\d+;"):
        build_index([counted], processor(), workers=2)
    assert counted.taken < 20
    assert not active_children()


def test_the_report_counts_and_groups(tmp_path):
    rows = [row("a"), b"{", row("<image>", images=["x.png"]), row("<image>", images=["y.png"])]
    files = [write_jsonl(tmp_path / "broken.jsonl", rows), write_mixed(tmp_path)]
    index, bad = index_of(files, processor())
    text = index_report(index, bad)
    lines = text.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:4]}
    assert cells["broken"][:2] == ["1", "3"] and cells["mixed"][:2] == ["40", "0"]
    totals = [index.length.sum(), index.targets.sum(), index.media.sum(), index.patches.sum()]
    assert cells["all"] == [f"{n:,}" for n in (41, 3, *totals, index.length.max())]
    bars = [line for line in lines if " - " in line and line[:8].strip()[:1].isdigit()]
    assert sum(int(line.split()[3]) for line in bars) == 41
    assert "3 samples will be dropped" in text
    assert f"2 x {files[0]}:3: {tmp_path}/x.png does not exist" in text
    assert f"1 x {files[0]}:2: not a line of JSON" in text and "y.png" not in text


def test_reasons_that_differ_in_numbers_are_one(tmp_path):
    index, _ = index_of([write_mixed(tmp_path)], processor())
    bad = [Entry(f"a:{n}", f"has {n} tokens, more than max_length 80", "index") for n in (81, 90)]
    assert "2 x a:81: has 81 tokens" in index_report(index, bad)


def test_a_report_of_files_whose_names_are_no_utf_8_can_be_printed(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff.jsonl")
    index, bad = index_of([write_jsonl(Path(name), [row("hi"), b"{"])], processor())
    assert "d\\udcff" in index_report(index, bad).encode().decode()


def test_the_command_prints_the_report_and_caches(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRAFTVL_CACHE", str(tmp_path / "cache"))
    data = [str(write_mixed(tmp_path)), "--model", str(GOLDEN / "model")]
    arguments = [*data, "--dataset_num_proc", "1"]
    assert main(arguments) == 0
    assert "tokens of a sample" in capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "index").glob("*.npz"))) == 1
    assert main([*arguments, "--max_length", "0"]) == 2
    assert "max_length is 0" in capsys.readouterr().err
    assert main([str(tmp_path / "no.jsonl"), *data[1:]]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/no.jsonl does not exist\n"


def test_the_command_runs_as_a_module(tmp_path):
    words = ["-m", "vlm.data.index", str(write_mixed(tmp_path)), "--model", str(GOLDEN / "model")]
    done = subprocess.run(
        [sys.executable, *words, "--dataset_num_proc", "2"],
        cwd=ROOT,
        env=os.environ | {"GRAFTVL_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mixed" in done.stdout and "40" in done.stdout

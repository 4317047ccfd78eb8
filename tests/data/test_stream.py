"""A stream gives the same global batches to any ranks and workers, and goes on anywhere."""

import io
import json
import os
import signal
import tarfile
from dataclasses import replace
from itertools import islice

import datasets
import fsspec
import pytest

from tests.data.samples import damage, processor, row, user, write_image, write_jsonl
from tests.data.test_loader import tensors
from vlm.data.loader import open_loader
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.processor import Processor
from vlm.data.sources import DataError
from vlm.data.stream import StreamDataset, open_stream
from vlm.data.watch import DataWorkerError

BEGIN = Position(0, 0)
TAKEN = 20
"""Two epochs of 8 steps, and the begin of a third."""


def rows_of(folder, shard, count=11):
    """Ragged texts, every second with an image."""
    rows = []
    for number in range(count):
        name = f"{shard}-{number}.png"
        names = [write_image(folder / name, 40 + 9 * number, 70, number)] * (number % 2)
        rows.append(row("<image>" * len(names) + f"shard {shard}", "answer " * (1 + number), names))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """31 good samples and two bad ones in three shards."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in "abc":
        rows = rows_of(folder, shard)
        if shard == "b":
            rows[4:4] = [b"{torn", b""]  # a bad line and a blank one
            rows[9] = {"messages": [user("no answer")]}
            del rows[-1]
        write_jsonl(folder / f"{shard}.jsonl", rows)
    return folder


def make_dataset(specs, rank=0, world=1, **options) -> StreamDataset:
    stream = open_stream(specs)
    budget = options.pop("budget", Budget(tokens=150, patches=300))
    window = options.pop("window", 3)
    shape = (4, window, options.pop("seed", 5), rank, world, budget)
    ours = processor(**options)
    return StreamDataset(stream, ours, frozenset({"vit", "aligner", "llm"}), *shape)


def taken(dataset, start=BEGIN, count=TAKEN, workers=0):
    with open_loader(dataset, start, workers) as loader:
        return list(islice(loader, count))


def batches(steps):
    """The samples of each step."""
    return [sorted(step.ids) for step in steps]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return taken(make_dataset([str(folder)]))


def test_an_epoch_has_every_good_sample_once(folder, uninterrupted):
    counts = [len(step.ids) for step in uninterrupted]
    assert counts == [4, 4, 4, 4, 4, 4, 4, 3] * 2 + [4] * 4
    assert [step.position.batch for step in uninterrupted] == [*range(8), *range(8), *range(4)]
    assert [step.position.epoch for step in uninterrupted] == [0] * 8 + [1] * 8 + [2] * 4
    epochs = [[i for s in uninterrupted[e : e + 8] for i in s.ids] for e in (0, 8)]
    lines = {"a": set(range(1, 12)), "b": set(range(1, 13)) - {5, 6, 10}, "c": set(range(1, 12))}
    everyone = sorted(f"{folder}/{name}.jsonl:{n}" for name in "abc" for n in lines[name])
    assert sorted(epochs[0]) == sorted(epochs[1]) == everyone
    assert epochs[0] != epochs[1]
    other = taken(make_dataset([str(folder)], seed=6))
    assert batches(other) != batches(uninterrupted)


def test_each_window_is_shuffled_in_its_own_way(tmp_path):
    """Windows of eight rows, of one shard, over two epochs: numbers of the rows in the window."""
    write_jsonl(tmp_path / "data.jsonl", [row(str(number)) for number in range(24)])
    steps = taken(make_dataset([str(tmp_path / "data.jsonl")], window=2), count=12)
    seen = [sorted(int(i.rpartition(":")[2]) - 1 for i in step.ids) for step in steps]
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert len({number // 8 for number in first + second}) == 1
        assert len({*first, *second}) == 8
    # six draws among 70 halves of a window, of which two may be alike
    assert len({tuple(number % 8 for number in batch) for batch in seen[::2]}) >= 5


def test_shards_come_in_another_order_in_other_epochs(folder):
    stream = open_stream([str(folder)])
    orders = [tuple(stream.order(5, epoch)) for epoch in range(6)]
    assert all(sorted(order) == [0, 1, 2] for order in orders) and len(set(orders)) > 2


@pytest.mark.parametrize("done", range(1, TAKEN - 1))
def test_resuming_anywhere_equals_the_uninterrupted_run(folder, uninterrupted, done):
    """By the position that the last step left, which is a few numbers."""
    place = uninterrupted[done - 1].next
    again = taken(make_dataset([str(folder)]), Position(**json.loads(json.dumps(vars(place)))), 5)
    rest = uninterrupted[done : done + 5]
    assert [tensors(s) for s in again[: len(rest)]] == [tensors(s) for s in rest]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(folder, uninterrupted, workers):
    steps = taken(make_dataset([str(folder)]), uninterrupted[1].next, TAKEN - 2, workers)
    assert [tensors(s) for s in steps] == [tensors(s) for s in uninterrupted[2:]]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_global_batches(folder, uninterrupted, world):
    ranks = [taken(make_dataset([str(folder)], rank, world)) for rank in range(world)]
    for parts, whole in zip(zip(*ranks, strict=True), uninterrupted, strict=True):
        assert sorted(i for part in parts for i in part.ids) == sorted(whole.ids)
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert {part.next for part in parts} == {whole.next}
        assert {part.window for part in parts} == {whole.window}
        assert [entry for part in parts for entry in part.bad] == whole.bad
        assert sum(part.flops for part in parts) == pytest.approx(whole.flops)


def test_bad_samples_are_told_with_their_window_and_skipped(folder, uninterrupted):
    first = [entry for step in uninterrupted[:8] for entry in step.bad]
    assert [entry.id for entry in first] == [f"{folder}/b.jsonl:{line}" for line in (5, 10)]
    assert "not a line of JSON" in first[0].reason and first[0].found == "reading"
    assert [entry for step in uninterrupted[8:16] for entry in step.bad] == first
    told = [step.position.batch for step in uninterrupted if step.bad]
    assert all(batch % 3 == 0 for batch in told)


def test_a_sample_bad_at_decoding_leaves_a_gap(folder, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", rows_of(tmp_path, "a", 8))
    damage(tmp_path / "a-3.png")
    steps = taken(make_dataset([str(tmp_path / "data.jsonl")]), count=2)
    assert sorted(len(step.ids) for step in steps) == [3, 4]
    (bad,) = [entry for step in steps for entry in step.bad]
    assert bad.id.endswith("data.jsonl:4") and bad.found == "decoding"


def with_bytes(folder, rows):
    return [
        {**r, "images": [{"bytes": (folder / name).read_bytes()} for name in r["images"]]}
        for r in rows
    ]


def write_tar(path, folder, rows, named=True):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for number, values in enumerate(rows):
            key = f"train/{number:04d}"
            files = [(f"{key}.png", (folder / name).read_bytes()) for name in values["images"]]
            names = [name.rpartition("/")[2] for name, _ in files]
            content = {**values, "images": names} if named else {"messages": values["messages"]}
            for name, data in [(f"{key}.json", json.dumps(content).encode()), *files]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_kind(folder, kind, rows):
    path = folder / f"data.{kind}"
    if kind == "parquet":
        table = datasets.Dataset.from_list(with_bytes(folder, rows))
        table.to_parquet(path, batch_size=3)  # groups of rows in which no window begins
    elif kind.startswith("tar"):
        write_tar(path, folder, rows)
    elif kind == "jsonl":
        write_jsonl(path, rows)
    else:
        with fsspec.open(str(path), "wb", compression="infer") as file:
            file.write((folder / "data.jsonl").read_bytes())
    return path


def unnamed(step):
    """The step's tensors, without what names the shard."""
    found = tensors(replace(step, bad=[], window=0))
    return {key: value for key, value in found.items() if ".ids" not in key}


@pytest.mark.parametrize("kind", ["parquet", "tar", "tar.gz", "jsonl.gz", "jsonl.xz"])
def test_every_kind_of_shard_gives_the_same(tmp_path, kind):
    rows = rows_of(tmp_path, "a")
    plain = taken(make_dataset([str(write_kind(tmp_path, "jsonl", rows))], window=2), count=4)
    path = write_kind(tmp_path, kind, rows)
    steps = taken(make_dataset([str(path)], window=2), count=4)
    assert len(steps[0].ids) == 4 and any(len(b.patches) for s in steps for b in s.micro_batches)
    assert [unnamed(s) for s in steps] == [unnamed(s) for s in plain]
    # from the second window on, which begins in the middle of the shard
    assert steps[1].next.row == 8
    again = taken(make_dataset([str(path)], window=2), steps[1].next, 2)
    assert [tensors(s) for s in again] == [tensors(s) for s in steps[2:]]


def test_an_archive_whose_json_names_no_image(tmp_path):
    rows = rows_of(tmp_path, "a")
    write_tar(tmp_path / "named.tar", tmp_path, rows)
    write_tar(tmp_path / "plain.tar", tmp_path, rows, named=False)
    named, plain = (
        taken(make_dataset([str(tmp_path / name)]), count=3) for name in ("named.tar", "plain.tar")
    )
    assert [unnamed(s) for s in plain] == [unnamed(s) for s in named]


def test_an_archive_without_json_is_all_bad(tmp_path):
    name = write_image(tmp_path / "0.png", 40, 40)
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        archive.add(tmp_path / name, name)
    with pytest.raises(DataError, match=r"data.tar:0: has 0 .json files"):
        make_dataset([str(tmp_path / "data.tar")]).costliest()


def test_shards_behind_a_url(folder, uninterrupted):
    memory = fsspec.filesystem("memory")
    for shard in "abc":
        rows = [json.loads(x) for x in (folder / f"{shard}.jsonl").read_bytes().splitlines()[:4]]
        for values in rows:
            values["images"] = [str(folder / name) for name in values["images"]]
        lines = "".join(json.dumps(values) + "\n" for values in rows)
        memory.pipe_file(f"/data/{shard}.jsonl", lines.encode())
    try:
        dataset = make_dataset([{"path": "memory://data/*.jsonl", "media_root": str(folder)}])
        steps = taken(dataset, count=6, workers=1)
    finally:
        memory.rm("/data", recursive=True)
    ids = sorted(name for step in steps[:3] for name in step.ids)
    assert ids == sorted(f"memory:///data/{s}.jsonl:{n}" for s in "abc" for n in range(1, 5))


def test_loss_is_told_by_source(folder):
    specs = [str(folder / "[ab].jsonl"), {"path": str(folder / "c.jsonl"), "name": "third"}]
    dataset = make_dataset(specs)
    assert dataset.sources == ["[ab]", "third"]
    for step in taken(dataset, count=8):
        for batch in step.micro_batches:
            owners = {int("c.jsonl" in name) for name in batch.ids}
            assert set(batch.sources.tolist()) == owners


@pytest.mark.parametrize("change", ["between two files", "in a header", "damaged header"])
def test_no_sample_of_a_damaged_archive_is_lost_in_silence(tmp_path, change):
    path = write_kind(tmp_path, "tar", rows_of(tmp_path, "a"))
    with tarfile.open(path) as archive:
        place = archive.getmembers()[5].offset
    content = path.read_bytes()
    if change == "damaged header":
        path.write_bytes(content[:place] + b"x" * 512 + content[place + 512 :])
    else:
        path.write_bytes(content[: place + 100 * (change == "in a header")])
    (shard,) = open_stream([str(path)]).shards
    with pytest.raises(DataError, match="cut off or damaged"):
        list(shard.rows(0))


def test_a_worker_that_dies_is_told_with_its_row(folder, monkeypatch):
    measure = Processor.measure

    def die(self, sample):
        if sample.id.endswith("c.jsonl:7"):
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(self, sample)

    monkeypatch.setattr(Processor, "measure", die)
    with pytest.raises(DataWorkerError, match=r"was killed .* while it read \S*/c.jsonl:7;"):
        taken(make_dataset([str(folder)]), workers=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_cut_off_ends_the_run(tmp_path, workers):
    """It is not skipped: another rank may have read it."""
    write_kind(tmp_path, "tar.gz", rows_of(tmp_path, "a"))
    damage(tmp_path / "data.tar.gz")
    with pytest.raises(DataWorkerError, match=r"^\S*/data.tar.gz cannot be read \(.*repair or"):
        taken(make_dataset([str(tmp_path / "data.tar.gz")]), workers=workers)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("none.jsonl", "none.jsonl does not exist"),
        ("*.tar", "has no shard"),
        ("a-1.png", "is no shard of a stream"),
        ("nonsense://bucket/x.tar", "cannot be opened"),
        ({"path": "a.jsonl", "weight": 2.0}, "may have path, name and media_root alone"),
        ("a.jsonl#5", "may have path, name and media_root alone"),
    ],
)
def test_what_cannot_be_streamed_is_said(folder, monkeypatch, spec, reason):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=reason) as raised:
        open_stream([spec])
    assert "\n" not in str(raised.value)


def test_text_alone_teaches_a_frozen_language_model_nothing(tmp_path):
    for name, rows in (("a", []), ("b", rows_of(tmp_path, "b", 2))):
        write_jsonl(tmp_path / f"{name}.jsonl", [row(f"{name} {n}") for n in range(9)] + rows)
    text, mixed = (
        replace(make_dataset([str(tmp_path / name)], window=1), skips_text=True)
        for name in ("a.jsonl", "b.jsonl")
    )
    with pytest.raises(DataError, match=r"no sample has an image.*frozen"):
        text.costliest()
    assert len(mixed.costliest().patches), "its first window is text alone"


def test_a_local_url_is_a_path(folder):
    """So that its images are found, and its samples called alike."""
    plain, url = (open_stream([spec]) for spec in (str(folder), f"file://{folder}"))
    assert url == plain


def test_the_warm_up_takes_the_costliest_of_the_first_window(folder, uninterrupted):
    batch = make_dataset([str(folder)]).costliest()
    assert len(batch.input_ids) >= max(
        len(b.input_ids) for s in uninterrupted[:3] for b in s.micro_batches
    )

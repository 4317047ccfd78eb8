"""Steps come in the plan's order from any position on, and a bad sample leaves a clean gap."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.samples import damage, index_of, processor, row, write_image, write_jsonl
from tests.tiny import hybrid
from vlm.data.collate import collate
from vlm.data.features import FeatureCache
from vlm.data.index import build_index
from vlm.data.ledger import Entry, Ledger, TooManyBadSamples
from vlm.data.loader import Step, StepDataset, make_plan, open_loader
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.sources import DataError, open_sources

SAMPLES = 23
BATCH = 6
BEGIN = Position(0, 0)


def write_data(folder: Path, samples: int = SAMPLES) -> Path:
    """Ragged texts; every third without an image, some with two."""
    rows = []
    for number in range(samples):
        names = [
            write_image(folder / f"{number}-{i}.jpg", 40 + 9 * number, 70, number)
            for i in range(number % 3)
        ]
        question = "<image>" * len(names) + f"question {'very ' * (number % 5)}{number}"
        rows.append(row(question, "answer " * (1 + number % 4), names))
    return write_jsonl(folder / "data.jsonl", rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def make_dataset(folder, rank=0, world=1, budget=None, **options) -> StepDataset:
    ours = processor(**options)
    index, bad = index_of([folder / "data.jsonl"], ours)
    assert not bad
    budget = budget or Budget(tokens=130, patches=300)
    return StepDataset(
        index, ours, make_plan(index, index.length.astype(float), BATCH, 5, world, budget), rank
    )


def taken(dataset, start=BEGIN, count=9, workers=0, timeout=600) -> list[Step]:
    with open_loader(dataset, start, workers, timeout=timeout) as loader:
        return list(islice(loader, count))


def tensors(value, name=""):
    """Every tensor of a step, by name, and every plain value beside them."""
    if hasattr(value, "equal"):
        return {name: value.tolist()}
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        found = {}
        for key, item in pairs:
            found |= tensors(item, f"{name}.{key}")
        return found
    return {name: value}


def steps(dataset, start=BEGIN, count=9, workers=0):
    return [tensors(step) for step in taken(dataset, start, count, workers)]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return steps(make_dataset(folder))


@pytest.mark.parametrize("mode", ["packed", "samples"])
def test_steps_follow_the_plan(folder, mode):
    dataset = make_dataset(folder, budget=Budget(mode, 2, 130, 300))
    size = dataset.plan.steps_per_epoch
    assert size == 4
    for number, step in enumerate(taken(dataset, count=2 * size)):
        assert step.position == Position(*divmod(number, size))
        expected = dataset.plan.samples(step.position)
        lines = {f"{folder}/data.jsonl:{dataset.index.line[n]}" for n in expected}
        assert {id for batch in step.micro_batches for id in batch.ids} == lines
        assert not step.bad
        assert len(step.micro_batches) > 1
        for batch in step.micro_batches:
            if mode == "packed":
                assert len(batch.input_ids) <= 130 and len(batch.patches) <= 300
            else:
                assert len(batch.ids) <= 2


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("done", [1, 3, 4, 7])
def test_resuming_anywhere_equals_the_uninterrupted_run(folder, uninterrupted, done, workers):
    start = Position(*divmod(done, 4))
    assert steps(make_dataset(folder), start, 9 - done, workers) == uninterrupted[done:]


def test_ranks_share_each_global_batch_whatever_the_world(folder):
    alone = make_dataset(folder)
    for world in (2, 3, 8):
        ranks = [make_dataset(folder, rank, world) for rank in range(world)]
        for position in (Position(0, 0), Position(0, 3), Position(1, 2)):
            parts = [dataset[position] for dataset in ranks]
            assert len({len(part.micro_batches) for part in parts}) == 1
            ids = [i for part in parts for batch in part.micro_batches for i in batch.ids]
            whole = alone[position]
            real = sorted(i for i in ids if "data.jsonl" in i)
            assert real == sorted(i for batch in whole.micro_batches for i in batch.ids)
            assert sum(part.targets for part in parts) == whole.targets


def test_an_empty_micro_batch_is_one_token_and_a_dummy_image(folder):
    config = processor().config
    batch = collate([], config)
    assert len(batch.input_ids) == 1 and batch.segments.lengths == (1,)
    assert len(batch.targets) == len(batch.target_rows) == len(batch.visual_rows) == 0
    assert batch.patches.shape == (4, config.vision.patch_dim) and not batch.patches.any()
    assert batch.input_ids.item() not in (config.image_token_id, config.video_token_id)


def test_a_sample_bad_at_decoding_leaves_the_others_as_they_were(tmp_path):
    write_data(tmp_path)
    sound = make_dataset(tmp_path)
    before = [sound[Position(0, b)] for b in range(4)]
    damage(tmp_path / "22-0.jpg")
    broken = make_dataset(tmp_path)
    id, found = f"{tmp_path}/data.jsonl:23", []
    for workers in (0, 2):
        after = taken(broken, count=4, workers=workers)
        bad = [entry for step in after for entry in step.bad]
        assert [entry.id for entry in bad] == [id]
        assert "22-0.jpg is damaged" in bad[0].reason and bad[0].found == "decoding"
        for old, new in zip(before, after, strict=True):
            assert len(old.micro_batches) == len(new.micro_batches)
            for whole, rest in zip(old.micro_batches, new.micro_batches, strict=True):
                kept = [i for i in whole.ids if i != id]
                assert [i for i in rest.ids if "data.jsonl" in i] == kept
                if id not in whole.ids:
                    assert tensors(whole) == tensors(rest)
        found.append([tensors(step) for step in after])
    assert found[0] == found[1]


def test_a_micro_batch_whose_every_sample_is_bad_has_no_target(tmp_path):
    write_image(tmp_path / "a.jpg", 64, 64)
    write_jsonl(tmp_path / "data.jsonl", [row("<image>", images=["a.jpg"])])
    damage(tmp_path / "a.jpg")
    step = make_dataset(tmp_path)[Position(0, 0)]
    assert step.targets == 0 and len(step.bad) == 1
    assert [len(batch.input_ids) for batch in step.micro_batches] == [1]


def test_the_costliest_micro_batch_is_the_largest_samples_together(folder, tmp_path):
    dataset = make_dataset(folder, budget=Budget("samples", 2))
    largest = sorted(dataset.index.length.tolist())[-2:]
    assert sorted(dataset.costliest().segments.lengths) == largest
    # with all of its patches, though a cache may know them later
    cached = replace(dataset, features=FeatureCache.of(tmp_path, hybrid().visual))
    assert cached.costliest().features is None


def test_a_sample_that_has_changed_since_it_was_indexed_is_bad(tmp_path):
    """A larger image than the index saw would break the budget; a longer text likewise."""
    write_data(tmp_path)
    dataset = make_dataset(tmp_path)
    write_image(tmp_path / "1-0.jpg", 280, 280)
    (step,) = taken(replace(dataset, plan=replace(dataset.plan, global_batch_size=23)), count=1)
    (bad,) = step.bad
    assert bad.id == f"{tmp_path}/data.jsonl:2"
    assert "and 400 patches, but had" in bad.reason and "changed since" in bad.reason


def test_each_target_knows_its_source(tmp_path):
    for name, answers in (("a", 5), ("b", 3)):
        write_jsonl(
            tmp_path / f"{name}.jsonl", [row("hi", f"{name} " * (n + 1)) for n in range(answers)]
        )
    ours, files = processor(), [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    index, _ = index_of(files, ours)
    dataset = StepDataset(
        index, ours, make_plan(index, index.length.astype(float), 8, 5, 1, Budget()), 0
    )
    assert dataset.sources == ["a", "b"]
    step = dataset[BEGIN]
    expected = [int(index.targets[index.source == source].sum()) for source in (0, 1)]
    assert step.targets_by_source == expected
    (batch,) = step.micro_batches
    owner = torch.tensor([int("b.jsonl" in name) for name in batch.ids])
    of_rows = owner.repeat_interleave(torch.tensor(batch.segments.lengths))
    assert torch.equal(batch.sources, of_rows[batch.target_rows])


def test_skipped_text_counts_once_over_all_ranks(folder):
    whole = make_dataset(folder)
    for world in (1, 3):
        plan = replace(whole.plan, world=world, skips_text=True)
        for batch in range(4):
            position = Position(0, batch)
            parts = [replace(whole, plan=plan, rank=rank)[position] for rank in range(world)]
            assert sum(part.targets for part in parts) == whole[position].targets
            learnt = sum(sum(part.targets_by_source) for part in parts)
            assert learnt < whole[position].targets
            assert all(len(b.visual_rows) for part in parts for b in part.micro_batches if b.ids)


def test_the_index_agrees_with_the_examples(folder):
    dataset = make_dataset(folder)
    for number in range(SAMPLES):
        example = dataset.processor.encode(dataset.index.sample(number))
        assert dataset.index.length[number] == example.length
        assert dataset.index.targets[number] == (example.targets != -100).sum()
        assert dataset.index.patches[number] == len(example.patches)


def test_the_ledger_records_each_sample_once_across_restarts(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first, second = Entry("a:1", "torn", "index"), Entry("a:2", "é\n", "decoding")
    ledger = Ledger(path)
    ledger.record([first, first])
    ledger.record([second, first])
    again = Ledger(path)
    again.record([second, first])
    assert set(again.entries.values()) == {first, second}
    assert len(path.read_text().splitlines()) == 2


def test_what_was_mended_since_counts_no_more(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record([Entry("a:1", "torn", "index"), Entry("a:2", "cut", "decoding")])
    again = Ledger(path)
    assert list(again.entries) == ["a:2"], "what the index finds, it finds again"
    with pytest.raises(TooManyBadSamples, match=r"1 of 9 .*ledger\.jsonl; mend the samples"):
        again.check(9, 0.1)
    strict = Ledger(path, strict=True)
    strict.check(10, 0.1)
    strict.record([Entry("a:2", "cut", "decoding")])
    with pytest.raises(TooManyBadSamples, match="a:2: cut; on_bad is error"):
        strict.check(10, 0.1)


def test_an_epoch_without_a_sample_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", [row("hi")])
    index, _ = build_index(open_sources([{"path": str(path), "weight": 0.4}]), processor())
    with pytest.raises(DataError, match=r"an epoch has no sample.*weights"):
        make_plan(index, np.ones(1), 4, 0, 1, Budget())


def test_too_many_bad_samples_stop_with_a_summary(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.check(0, 0.01)
    ledger.record([Entry("a:1", "torn", "index"), Entry("a:9", "cut", "decoding")])
    ledger.check(200, 0.01)
    with pytest.raises(TooManyBadSamples, match=r"2 of 199 samples.*1 at index.*a:1: torn"):
        ledger.check(199, 0.01)


def test_a_ledger_torn_by_a_kill_is_read_up_to_the_tear(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record([Entry("a:1", "torn", "index")])
    path.write_text(path.read_text() + '{"id": "a:2", "rea')
    Ledger(path).record([Entry("a:3", "cut", "index")])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a:1", "a:3"]


@pytest.mark.parametrize("name", ["x\u2028y.png", "x\x85y.png", "\ud800.png"])
def test_a_ledger_holds_any_file_name(tmp_path, name):
    entry = Entry("a:1", f"{name} does not exist", "decoding")
    Ledger(tmp_path / "ledger.jsonl").record([entry])
    assert Ledger(tmp_path / "ledger.jsonl").entries["a:1"].id == "a:1"

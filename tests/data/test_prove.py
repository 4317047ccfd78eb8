"""The proof of packing holds on a sound collator, and names the tower where one is broken."""

from dataclasses import replace

import pytest

from tests.data.samples import row, write_image, write_jsonl
from tests.tiny import write_hybrid
from vlm.batch import Segments
from vlm.data import prove as proving
from vlm.data.processor import Processor
from vlm.data.prove import prove
from vlm.data.sources import DataError, open_sources


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_hybrid(tmp_path_factory.mktemp("prove") / "model")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    images = [write_image(folder / f"{n}.png", 40 + 20 * n, 90, n) for n in range(4)]
    seen = [
        row("<image>" * (n % 3) + f"what is {n}?", f"it is {n}", images[: n % 3]) for n in (1, 2, 4)
    ]
    text = [row("hi", "ok", loss_scale=0.5), b"{", row("where?", "here and there")]
    seen[1]["messages"][1]["loss_scale"] = 0.5
    return write_jsonl(folder / "a.jsonl", seen), write_jsonl(folder / "b.jsonl", text)


def proof(files, model, count=5):
    sources = open_sources([str(file) for file in files])
    return prove(sources, Processor.from_pretrained(model), model, count)


@pytest.fixture
def fails(files, model, monkeypatch):
    """Names of the rows that fail where collate is broken by `change(batch)`."""
    collate = proving.collate

    def of(change):
        def broken(examples, config):
            batch = collate(examples, config)
            return change(batch) if len(examples) > 1 else batch

        monkeypatch.setattr(proving, "collate", broken)
        found = proof(files, model)
        assert not found.holds and "packing does not hold" in found.table()
        return {row.name for row in found.rows if not row.holds}

    return of


def test_it_holds_and_leaves_bad_samples_out(files, model):
    found = proof(files, model)
    assert found.holds and found.table().endswith("allowed)"), found.table()
    assert (found.samples, found.micro_batches) == (5, 1)
    assert [entry.id for entry in found.bad] == [f"{files[1]}:2"]
    assert all(row.alone > 0 for row in found.rows)
    cosines = [row.cosine for row in found.rows if row.name.startswith("gradient")]
    assert len(cosines) == 3 and min(cosines) > 1 - 1e-6


def test_samples_come_from_the_sources_in_turn(files, model):
    sources = open_sources([str(file) for file in files])
    examples, bad = proving.take_examples(sources, Processor.from_pretrained(model), 3)
    assert [e.id.rpartition("/")[2] for e in examples] == ["a.jsonl:1", "b.jsonl:1", "a.jsonl:2"]
    assert not bad


def test_text_alone_has_no_gradient_in_the_tower_and_holds(files, model):
    found = proof(files[1:], model)
    rows = {row.name: row for row in found.rows}
    assert found.holds and rows["gradient of vit"].alone == 0
    assert rows["gradient of vit"].cosine is None


def test_merged_samples_are_the_language_models_fault(fails):
    names = fails(lambda b: replace(b, segments=Segments.of([len(b.input_ids)])))
    assert {"loss", "gradient of llm", "hidden states beside a changed sample"} <= names
    assert "vision features beside a changed sample" not in names


def test_shifted_boundaries_are_the_language_models_fault(fails):
    def shift(batch):
        first, second, *rest = batch.segments.lengths
        return replace(batch, segments=Segments.of([first + 1, second - 1, *rest]))

    names = fails(shift)
    assert {"gradient of llm", "hidden states beside a changed sample"} <= names
    assert "vision features beside a changed sample" not in names


def test_merged_images_are_the_vision_towers_fault(fails):
    def merge(batch):
        plan = batch.vision
        frames = Segments.of([sum(plan.frames.lengths)])
        return replace(batch, vision=replace(plan, frames=frames))

    names = fails(merge)
    assert {"gradient of vit", "vision features beside a changed sample"} <= names


def test_one_sample_proves_nothing(files, model):
    with pytest.raises(DataError, match=r"1 good samples; packing takes two or more"):
        proof(files[:1], model, count=1)

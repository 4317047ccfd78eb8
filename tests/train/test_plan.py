"""Packed, a few samples each, or one by one: the plan changes no gradient of either tower."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import hybrid
from tests.train.runs import log_of, run_plain, run_until, same, weights_of
from train.config import TrainConfig, UsageError
from train.freeze import freeze
from vlm.batch import Segments
from vlm.cost import PARTS, part_of
from vlm.data.collate import collate
from vlm.data.index import build_index
from vlm.data.loader import StepDataset, make_plan
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.processor import Processor
from vlm.data.sources import open_sources
from vlm.loss import cross_entropy
from vlm.model import VisionLanguageModel

FIRST = Position(0, 0)
PLANS = {
    "packed": Budget("packed", tokens=256, patches=400),
    "all together": Budget("packed", tokens=10_000, patches=10_000),
    "two each": Budget("samples", 2),
    "one by one": Budget("samples", 1),
}


@pytest.fixture(scope="module")
def dataset(setting) -> StepDataset:
    """The first step has 10 of 16 ragged samples, text alone among them."""
    processor = Processor.from_pretrained(setting["model"])
    index, _ = build_index(open_sources(setting["dataset"]), processor)
    costs = index.costs(processor.config, PARTS)
    plan = make_plan(index, costs, 10, 42, 1, PLANS["packed"])
    return StepDataset(index, processor, plan, 0)


def gradients(model: VisionLanguageModel, parts) -> dict[str, torch.Tensor]:
    """Of the step that the ranks' parts make together, as train/sft.py adds it up."""
    model.zero_grad()
    targets = sum(part.targets for part in parts)
    for part in parts:
        for batch in part.micro_batches:
            hidden = model(batch)
            loss = cross_entropy(hidden, model.head_weight, batch.targets, batch.weights).sum
            (loss / targets).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def planned(dataset: StepDataset, world: int = 1, **changes):
    plan = replace(dataset.plan, world=world, **changes)
    return [replace(dataset, plan=plan, rank=rank)[FIRST] for rank in range(world)]


def per_part(found: dict, expected: dict) -> dict[str, float]:
    """The largest relative distance of each part's whole gradient."""
    assert set(found) == set(expected)
    distances = {}
    for part in PARTS:
        names = [name for name in expected if part_of(name) == part]
        ours = torch.cat([found[name].flatten() for name in names])
        theirs = torch.cat([expected[name].flatten() for name in names])
        distances[part] = float((ours - theirs).norm() / theirs.norm())
    return distances


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("name", PLANS)
def test_no_plan_changes_a_towers_gradient(dataset, name, world):
    model = hybrid(seed=0)
    samples = dataset.plan.samples(FIRST)
    alone = replace(
        planned(dataset)[0],
        micro_batches=[
            collate([dataset.processor.encode(dataset.index.sample(int(number)))], model.config)
            for number in samples
        ],
    )
    expected = gradients(model, [alone])
    parts = planned(dataset, world, budget=PLANS[name])
    assert len({len(part.micro_batches) for part in parts}) == 1
    assert max(per_part(gradients(model, parts), expected).values()) < 1e-5


def test_a_leak_between_packed_samples_would_be_seen(dataset):
    model = hybrid(seed=0)
    packed = planned(dataset)
    expected = gradients(model, packed)
    step = packed[0].micro_batches
    step[0] = replace(step[0], segments=Segments.of([len(step[0].input_ids)]))
    assert min(per_part(gradients(model, packed), expected).values()) > 1e-3


@pytest.mark.parametrize("frozen", [{"freeze_llm"}, {"freeze_llm", "freeze_vit"}])
def test_skipping_text_changes_no_gradient(setting, dataset, frozen):
    """Bit for bit: the same samples together, with the text alone in micro-batches of its own."""
    model = hybrid(seed=0)
    freeze(model, TrainConfig(**setting, output_dir="o", **dict.fromkeys(frozen, True)))
    (skipping,) = planned(dataset, skips_text=True)
    assert skipping.skipped_targets > 0
    taken = set(
        dataset.plan.samples(FIRST)[dataset.index.patches[dataset.plan.samples(FIRST)] == 0]
    )
    texts = [dataset.processor.encode(dataset.index.sample(int(number))) for number in taken]
    everything = replace(
        skipping,
        skipped_targets=0,
        micro_batches=[*skipping.micro_batches, collate(texts, model.config)],
    )
    assert everything.targets == skipping.targets
    ours, theirs = gradients(model, [skipping]), gradients(model, [everything])
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    forgotten = replace(skipping, skipped_targets=0)  # the comparison can fail
    assert not any(torch.equal(g, theirs[n]) for n, g in gradients(model, [forgotten]).items())


def test_a_run_that_skips_text_learns_the_same(setting, tmp_path):
    """Stage 1, six steps; only order of addition differs. The log's loss is of what was seen."""
    options = {"freeze_vit": True, "freeze_llm": True}
    skipping = run_plain(setting, tmp_path / "skipping", **options)
    whole = run_plain(setting, tmp_path / "whole", skip_text_only=False, **options)
    ours, theirs = weights_of(skipping, 6), weights_of(whole, 6)
    assert max((ours[n] - theirs[n]).abs().max() for n in theirs) < 2e-4
    for seen, full in zip(log_of(skipping), log_of(whole), strict=True):
        assert seen["grad_norm"] == pytest.approx(full["grad_norm"], rel=1e-3)
        assert seen["targets"] == full["targets"] and 7 < seen["loss"] < 10
    samples = [sum(line["samples"] for line in log_of(run)) for run in (skipping, whole)]
    assert samples == [24, 32]  # a quarter is text alone


def test_text_alone_is_refused_where_it_can_train_nothing(setting, tmp_path):
    file = tmp_path / "text.jsonl"
    turns = [{"role": role, "content": "word"} for role in ("user", "assistant")]
    file.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    text = setting | {"dataset": [str(file)]}
    with pytest.raises(ValueError, match="no sample has an image or video"):
        run_plain(text, tmp_path / "run", freeze_vit=True, freeze_llm=True)


def test_losses_of_each_source(setting, tmp_path):
    """The same data twice under two names: their losses, weighed by targets, are the loss."""
    (file,) = setting["dataset"]
    half = tmp_path / "half.jsonl"
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    half.write_text("".join(line + "\n" for line in lines if '"images": []' in line))
    both = setting | {"dataset": [str(file), str(half)]}
    run = run_plain(both, tmp_path / "run", global_batch_size=20, max_steps=1)
    (line,) = log_of(run)
    assert set(line["loss_by_source"]) == {"data", "half"}
    alone = log_of(run_plain(setting, tmp_path / "alone", global_batch_size=16, max_steps=1))[0]
    assert line["loss_by_source"]["data"] == pytest.approx(alone["loss"], rel=1e-5)
    assert alone["loss_by_source"] == {"data": alone["loss"]}
    share = alone["targets"] / line["targets"]
    mean = share * alone["loss"] + (1 - share) * line["loss_by_source"]["half"]
    assert line["loss"] == pytest.approx(mean, rel=1e-5)


def test_another_plan_resumes_where_the_first_one_stopped(setting, plain_run, tmp_path):
    """Packing is no part of what fixes a run."""
    run = run_until(setting, tmp_path / "run", 3, save_steps=3, plan="samples")
    run_plain(setting, run)
    pairs = list(zip(log_of(run), log_of(plain_run), strict=True))
    assert max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs) < 3e-5
    assert not same(weights_of(run, 6), weights_of(plain_run, 6))  # another order of addition


def test_a_budget_that_cannot_hold_a_sample_is_refused(setting):
    with pytest.raises(UsageError, match="max_length 8192 is above token_budget 4096"):
        TrainConfig(**setting, output_dir="o", token_budget=4096)

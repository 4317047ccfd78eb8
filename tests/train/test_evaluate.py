"""Evaluation tells whether a model looks, on samples it never trained on, and changes nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.data.samples import GOLDEN, assistant, processor, user
from tests.tiny import hybrid, write_hybrid
from tests.train.runs import (
    OPTIONS,
    damage,
    log_of,
    run_plain,
    run_ranks,
    run_until,
    same,
    weights_of,
)
from train.answers import split_answer
from train.config import TrainConfig, UsageError
from train.data import TrainData, open_data
from train.evaluate import BLANK, Evaluator, in_place_of
from train.state import Run
from train.world import World
from vlm.cost import PARTS
from vlm.data.collate import collate
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.image import load_image
from vlm.data.limits import Limits
from vlm.data.loader import open_loader
from vlm.data.processor import Processor
from vlm.data.view import pictures
from vlm.loss import cross_entropy

HALF = {"split_dataset_ratio": 0.5, "eval_steps": 2, "eval_answers": 4, "eval_max_new_tokens": 4}
"""Eight of the sixteen ragged samples of `setting`."""
COLOURS = ("one", "two", "three")
LOOKING = {"max_steps": 40, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
LOOKING |= {"max_grad_norm": 1.0, "global_batch_size": 12, "token_budget": 1024, "eval_steps": 40}


def opened(setting: dict, out: Path, **options) -> tuple[TrainData, Evaluator]:
    """The data of a run and its evaluator, without the run."""
    config = TrainConfig(**setting, output_dir=out, **OPTIONS | options)
    world, run = World.start(), Run(config, World.start())
    limits = {"max_length": config.max_length}
    ours = Processor.from_pretrained(config.model, Limits.of(config), **limits)
    data = open_data(config, world, run, ours, frozenset(PARTS), None)
    return data, Evaluator(config, world, ours, data, run)


def answers_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]


def untimed(figures: dict) -> dict:
    return {key: value for key, value in figures.items() if key != "seconds"}


def write_colours(folder: Path, name: str, samples: int) -> str:
    """Images of one colour, in several shades and sizes, and its number in words."""
    rng, lines = np.random.default_rng(len(name)), []
    for number in range(samples):
        pixels = np.full((28 * rng.integers(1, 4), 56, 3), 20, np.uint8)
        pixels[..., number % 3] = rng.integers(180, 256)
        Image.fromarray(pixels).save(folder / f"{name}-{number}.png")
        turns = [{"role": "user", "content": "<image>colour?"}]
        turns.append({"role": "assistant", "content": COLOURS[number % 3]})
        lines.append(json.dumps({"messages": turns, "images": [f"{name}-{number}.png"]}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def evaluated_run(setting, tmp_path_factory):
    """Six steps, evaluated before the first and after each second one."""
    return run_plain(setting, tmp_path_factory.mktemp("evaluated") / "run", save_steps=2, **HALF)


@pytest.fixture(scope="module")
def looking_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looking")
    setting = {"model": write_hybrid(folder / "model")}
    setting["dataset"] = [write_colours(folder, "train", 12)]
    setting["val_dataset"] = [write_colours(folder, "held out", 9)]
    return run_plain(setting, folder / "run", **LOOKING)


# ---- does it look?


def test_a_model_that_looks_needs_its_own_images(looking_run):
    before, after = log_of(looking_run, "eval")
    assert (before["step"], after["step"]) == (0, 40)
    assert before["loss_true"] > 8 and abs(before["loss_true"] - before["loss_blank"]) < 1
    assert after["loss_true"] == after["loss"] < 0.3 and after["token_accuracy"] > 0.9
    assert after["loss_shuffled"] > after["loss_true"] + 1
    assert after["loss_blank"] > after["loss_true"] + 1
    answers = [answer for answer in answers_of(looking_run) if answer["step"] == 40]
    assert len(answers) == 9 and all(answer["answer"] == answer["truth"] for answer in answers)


def test_a_model_that_does_not_look_has_one_loss(setting, tmp_path):
    """Its merger gives zeros, whatever it sees."""
    _, evaluator = opened(setting, tmp_path / "run", **HALF)
    model = hybrid()
    for parameter in model.visual.merger.parameters():
        parameter.data.zero_()
    figures = evaluator(model, 0)
    assert figures["loss_true"] == figures["loss_shuffled"] == figures["loss_blank"]
    figures = evaluator(hybrid(), 0)
    assert len({figures["loss_true"], figures["loss_shuffled"], figures["loss_blank"]}) == 3


@torch.no_grad()
def test_figures_are_those_of_the_samples_one_by_one(setting, tmp_path):
    """Against a short loop of its own: no packing, another sample's pixels put in by hand."""
    _, evaluator = opened(setting, tmp_path / "run", **HALF)
    model, index, ours = hybrid(), evaluator.held_out, evaluator.processor
    seen = [n for n in range(len(index)) if index.media[n]]
    strangers = {n: seen[other] for n, other in zip(seen, evaluator.others, strict=True)}
    sums, counts = dict.fromkeys(("all", "true", "shuffled", "blank", "text"), 0.0), {}
    right = 0
    for number in range(len(index)):
        example = ours.encode(index.sample(number))
        guises = {"all": example.patches, "text": example.patches}
        if number in strangers:
            other = ours.encode(index.sample(strangers[number]))
            del guises["text"]
            guises |= {"true": example.patches, "blank": torch.full_like(example.patches, BLANK)}
            guises["shuffled"] = in_place_of(example, other, ours.config.vision)
        for name, patches in guises.items():
            batch = collate([replace(example, patches=patches)], model.config)
            loss = cross_entropy(model(batch), model.head_weight, batch.targets, batch.weights)
            sums[name] += float(loss.sum)
            counts[name] = counts.get(name, 0) + len(batch.targets)
            right += int(loss.right.sum()) * (name == "all")
    found, mean = evaluator(model, 0), {name: sums[name] / counts[name] for name in sums}
    assert counts["text"] and counts["true"] < counts["all"]
    names = {"loss": "all", "text_loss": "text", "loss_true": "true"}
    names |= {"loss_shuffled": "shuffled", "loss_blank": "blank"}
    for name, here in names.items():
        assert found[name] == pytest.approx(mean[here], rel=1e-5), name
    assert found["n"] == 8 and found["token_accuracy"] == right / counts["all"]
    assert found["loss_by_source"] == {"data": found["loss"]}


def test_another_samples_images_take_this_ones_size(setting, tmp_path):
    _, evaluator = opened(setting, tmp_path / "run", **HALF)
    index, ours = evaluator.held_out, evaluator.processor
    vision = ours.config.vision
    most, few = (int(index.media.argmax()), int(np.flatnonzero(index.media == 1)[0]))
    example, other = (ours.encode(index.sample(number)) for number in (most, few))
    assert torch.equal(in_place_of(example, example, vision), example.patches)
    shown = in_place_of(example, other, vision)
    assert shown.shape == example.patches.shape and not torch.equal(shown, example.patches)
    ((only,),) = pictures(other, vision)
    assert torch.equal(only, load_image(index.sample(few).images[0]))
    grids = [(h * 14, w * 14, 3) for _, h, w in example.grid_thw]
    seen = pictures(replace(example, patches=shown), vision)
    assert [tuple(frame.shape) for (frame,) in seen] == grids
    assert all(abs(frame.float().mean() - only.float().mean()) < 8 for (frame,) in seen)


# ---- training stays as it is


def files_of(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint's engine: masters, moments and generators."""
    files = sorted((run / "checkpoint-6" / "engine").glob("*.safetensors"))
    return {f"{f.name} {key}": tensor for f in files for key, tensor in load_file(f).items()}


def trained(run: Path) -> list[tuple]:
    return [(x["step"], x["loss"], x["grad_norm"], x["samples"]) for x in log_of(run, "train")]


def test_evaluation_changes_no_bit_of_training(setting, evaluated_run, tmp_path):
    blind = run_plain(setting, tmp_path / "run", **HALF | {"eval_steps": 0}, save_steps=2)
    assert len(log_of(evaluated_run, "eval")) == 4 and not log_of(blind, "eval")
    assert same(weights_of(evaluated_run, 6), weights_of(blind, 6))
    assert any("rng" in name for name in files_of(blind))
    assert same(files_of(evaluated_run), files_of(blind))
    assert trained(evaluated_run) == trained(blind)


def test_a_drawn_number_would_be_seen(setting, tmp_path, monkeypatch):
    """The comparison above can fail."""
    honest = Evaluator.__call__

    def draws(evaluator, model, step):
        torch.rand(1)
        return honest(evaluator, model, step)

    monkeypatch.setattr(Evaluator, "__call__", draws)
    drawn = run_plain(setting, tmp_path / "drawn", **HALF, save_steps=2)
    blind = run_plain(setting, tmp_path / "run", **HALF | {"eval_steps": 0}, save_steps=2)
    assert not same(files_of(drawn), files_of(blind))


def test_two_ranks_share_the_work_and_train_the_same(setting, two_rank_run, tmp_path):
    watched = setting | {"val_dataset": setting["dataset"]}
    options = {"eval_steps": 2, "eval_answers": 4, "eval_max_new_tokens": 4, "save_steps": 2}
    ours = run_ranks(watched, tmp_path / "ours", 2, dataloader_num_workers=1, **options)
    assert same(weights_of(ours, 6), weights_of(two_rank_run, 6))
    assert same(files_of(ours), files_of(two_rank_run))
    alone = run_plain(watched, tmp_path / "alone", **options)
    for found, expected in zip(log_of(ours, "eval"), log_of(alone, "eval"), strict=True):
        assert found["n"] == expected["n"] == 16
        for name in set(expected) - {"seconds", "loss_by_source", "event"}:
            assert found[name] == pytest.approx(expected[name], rel=2e-4), name
    assert answers_of(ours)[:4] == answers_of(alone)[:4]
    assert [x["step"] for x in answers_of(ours)] == [x["step"] for x in answers_of(alone)]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(setting, tmp_path, training):
    _, evaluator = opened(setting, tmp_path / "run", **HALF)
    model, state = hybrid().train(training), torch.get_rng_state()
    modes = []
    model.visual.register_forward_hook(lambda module, *_: modes.append(module.training))
    evaluator(model, 0)
    assert not any(modes) and all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- nothing leaks


def write_shared(folder: Path) -> str:
    """Forty rows over ten images, in no order, some with two of them; and some texts twice."""
    rng, lines = np.random.default_rng(3), []
    for number in range(10):
        levels = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
    for number in range(40):
        images = [f"{n}.png" for n in rng.choice(10, int(number % 10 == 0) + 1, replace=False)]
        images = [] if number % 4 == 3 else images
        question = "<image>" * len(images) + (f"question {number}" if images else f"{number % 8}")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"messages": turns, "images": images}))
    path = folder / "shared.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("seed", range(4))
def test_no_step_has_a_held_out_sample_image_or_text(setting, tmp_path, seed):
    shared = setting | {"dataset": [write_shared(tmp_path)]}
    options = {"split_dataset_ratio": 0.4, "seed": seed}
    data, evaluator = opened(shared, tmp_path / "run", **options)
    unseen = [data.held_out.sample(number) for number in range(len(data.held_out))]
    index, dataset = data.dataset.index, data.dataset
    ids, epochs = set(), 3
    with open_loader(dataset, data.progress.position) as steps:
        for _ in range(epochs * dataset.plan.steps_per_epoch):
            ids |= set(next(steps).ids)
    assert 6 <= len(unseen) <= 16 and len(ids) == len(index) == 40 - len(unseen)
    assert not ids & {sample.id for sample in unseen}
    trained = [index.sample(number) for number in range(len(index))]
    assert not {i for s in trained for i in s.images} & {i for s in unseen for i in s.images}
    texts = [{s.messages for s in side if not s.images} for side in (trained, unseen)]
    assert not texts[0] & texts[1]
    # and what is shown in place of an image is never the image itself
    looking = [s for s in unseen if s.images]
    for sample, other in zip(looking, evaluator.others, strict=True):
        assert not set(sample.images) & set(looking[other].images)


def test_a_resume_with_another_split_is_refused(setting, tmp_path):
    run = run_until(setting, tmp_path / "run", 3, save_steps=3, **HALF)
    for ratio in (0.25, 0.0):
        with pytest.raises(UsageError, match="the data differs"):
            run_plain(setting, run, **HALF | {"split_dataset_ratio": ratio, "eval_steps": -1})


def test_a_resumed_run_evaluates_each_step_once(setting, evaluated_run, tmp_path):
    run = run_until(setting, tmp_path / "run", 4, save_steps=2, **HALF)
    shutil.rmtree(run / "checkpoint-4")  # the evaluation of step 4 is done again
    with (run / "answers.jsonl").open("a") as file:
        file.write('{"step": 2, "id"')  # someone's editor
    run_plain(setting, run, save_steps=2, **HALF)
    assert same(weights_of(run, 6), weights_of(evaluated_run, 6))
    ours, theirs = log_of(run, "eval"), log_of(evaluated_run, "eval")
    assert [line["step"] for line in ours] == [0, 2, 4, 6]
    assert list(map(untimed, ours)) == list(map(untimed, theirs))
    assert answers_of(run) == answers_of(evaluated_run)


# ---- what is asked for


def test_when_it_is_due(setting, tmp_path):
    def steps(**options) -> list[int]:
        _, evaluator = opened(setting, tmp_path / "run", **options)
        return [step for step in range(7) if evaluator.due(step, last=step == 6)]

    assert steps() == steps(**HALF | {"eval_steps": 0}) == []
    assert steps(**HALF | {"eval_steps": -1}) == [6]
    assert steps(**HALF | {"eval_steps": 4}) == [0, 4, 6]
    assert steps(text_probe=setting["dataset"]) == [6]


def test_answers_hold_what_a_reader_needs(setting, evaluated_run):
    answers = answers_of(evaluated_run)
    assert [answer["step"] for answer in answers] == [0] * 4 + [2] * 4 + [4] * 4 + [6] * 4
    (file,) = setting["dataset"]
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    assert len({answer["id"] for answer in answers}) == 4
    for answer in answers:
        row = rows[int(answer["id"].rpartition(":")[2]) - 1]
        assert answer["question"] == row["messages"][0]["content"]
        assert answer["truth"] == row["messages"][1]["content"]
        assert len(answer["images"]) == len(row["images"])
        assert all(uri.startswith("data:image/jpeg;base64,") for uri in answer["images"])


CALL = {"role": "tool_call", "content": '{"name": "look", "arguments": {}}'}
CONVERSATIONS = {
    "turns": {"messages": [user("one"), assistant("a"), user("two"), assistant("b c")]},
    "a call of a tool": {"messages": [user("one"), assistant("I look."), CALL]},
    "no question": {"messages": [{"role": "system", "content": "s"}, assistant("a")]},
    "a box": {
        "messages": [user("<image>where?"), assistant("At <bbox>.")],
        "images": ["images/big1600x1200.jpg"],
        "objects": {"bbox": [[160, 120, 800, 600]]},
    },
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_question_and_answer_are_the_two_ends_of_what_is_trained_on(name):
    ours = processor()
    sample = parse_row(CONVERSATIONS[name], "data.jsonl:1", RowContext(GOLDEN))
    question, truth = split_answer(sample, ours)
    whole, prompt = ours.encode(sample).input_ids.tolist(), ours.prompt(question).input_ids.tolist()
    assert whole[: len(prompt)] == prompt
    learnt = ours.tokenizer.decode(whole[len(prompt) :], skip_special_tokens=False)
    assert truth and learnt == truth + "<|im_end|>\n"


def test_texts_alone_have_a_loss_and_no_look(setting, tmp_path):
    file = tmp_path / "texts.jsonl"
    turns = [{"role": role, "content": "word"} for role in ("user", "assistant")]
    file.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    _, evaluator = opened(setting, tmp_path / "held out", val_dataset=[str(file)])
    figures = evaluator(hybrid(), 0)
    names = {"n", "loss", "loss_by_source", "token_accuracy", "text_loss", "seconds"}
    assert set(figures) == names and figures["text_loss"] == figures["loss"]
    _, evaluator = opened(setting, tmp_path / "probe", text_probe=[str(file)])
    alone = evaluator(hybrid(), 0)
    assert set(alone) == {"text_loss", "seconds"} and alone["text_loss"] == figures["loss"]


def test_stage_1_and_a_stream_are_evaluated(setting, tmp_path):
    """Text alone is left out of a step there, but not of the held-out samples."""
    options = {"freeze_vit": True, "freeze_llm": True, "streaming": True}
    held_out = {"val_dataset": setting["dataset"], "eval_answers": 0, "eval_steps": 100}
    run = run_plain(setting, tmp_path / "run", **options, **held_out)
    before, after = log_of(run, "eval")
    assert before["n"] == after["n"] == 16
    assert before["text_loss"] == after["text_loss"] and before["loss_true"] > after["loss_true"]
    assert not answers_of(run)


def test_a_bad_held_out_sample_is_recorded_and_left_out(tmp_path):
    setting = {"model": write_hybrid(tmp_path / "model")}
    setting["dataset"] = [write_colours(tmp_path, "train", 12)]
    setting["val_dataset"] = [write_colours(tmp_path, "held", 6)]
    damage(tmp_path / "held-4.png")
    run = run_plain(setting, tmp_path / "run", max_bad_fraction=0, max_steps=1)
    run_plain(setting, run, max_bad_fraction=0, max_steps=2)  # and keeps no run from going on
    assert [(line["step"], line["n"]) for line in log_of(run, "eval")] == [(1, 5), (2, 5)]
    (entry,) = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert entry["id"].endswith("held.jsonl:5") and "damaged" in entry["reason"]
    assert len(answers_of(run)) == 10


def test_a_split_that_holds_nothing_out_is_refused(setting, tmp_path):
    with pytest.raises(UsageError, match="of 16 samples holds none out"):
        opened(setting, tmp_path / "run", split_dataset_ratio=0.01)

"""bench/peers: the same samples for all, equal gradients, and the figures of a quick look.

What needs ms-swift is not run here; transformers' Trainer is, in whichever environment has it.
"""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.naive import naive_flops
from bench.peers import systems
from bench.peers.__main__ import gradient, main
from bench.peers.gradients import GROUPS, compare
from bench.peers.plain import IGNORED, Conversations, PadRight, open_processor
from bench.peers.profile import POINTWISE, REST, shares
from bench.peers.results import Figures, figures_of, misses, table, work_row
from bench.peers.setting import GLOBAL_BATCH, MAX_PIXELS, MIN_PIXELS, SEED, write_setting
from bench.peers.systems import SYSTEMS
from bench.peers.watch import PeerError, Watched, watch
from bench.peers.work import Work, work
from vlm.checkpoint import load_model
from vlm.cost.samples import Samples
from vlm.data.collate import collate
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.limits import Limits
from vlm.data.plan import epoch_order
from vlm.data.processor import Processor, Sizes
from vlm.hf_config import read_config
from vlm.loss import cross_entropy
from vlm.vision import normalise


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("setting"), "tiny", warm_up=1, steps=2)


@pytest.fixture(scope="module")
def examples(setting):
    """By ours, the samples of the sequence."""
    processor = Processor.from_pretrained(setting.model, Limits(max_pixels=MAX_PIXELS))
    context = RowContext(setting.model.parent)
    rows = rows_of(setting.sequence)
    return [processor.encode(parse_row(row, str(n), context)) for n, row in enumerate(rows)]


@pytest.fixture(scope="module")
def conversations(setting) -> Conversations:
    """By the plain loop, the same."""
    processor = open_processor(str(setting.model), MIN_PIXELS, MAX_PIXELS)
    return Conversations(str(setting.sequence), processor)


def test_every_system_has_the_same_samples_in_every_step(setting):
    sequence, ours, grouped = map(rows_of, (setting.sequence, setting.ours, setting.grouped))
    assert len(sequence) == 3 * GLOBAL_BATCH
    order = epoch_order((len(ours),), (1.0,), SEED, 0)
    assert [ours[number] for number in order] == sequence
    assert grouped[:GLOBAL_BATCH] == sequence[:GLOBAL_BATCH]
    assert sorted(map(json.dumps, grouped)) == sorted(map(json.dumps, sequence))


def test_the_samples_are_ragged_and_some_are_text_alone(setting, examples):
    lengths = [example.length for example in examples]
    assert lengths[GLOBAL_BATCH:] == [sizes.length for sizes in setting.sizes]
    assert max(lengths) > 2 * np.mean(lengths)
    alone = [example for example in examples if not example.grid_thw]
    assert 0 < len(alone) < len(examples) / 2
    assert any(len(example.grid_thw) > 1 for example in examples)
    grids = [grid for example in examples for grid in example.grid_thw]
    assert max(h * w for _, h, w in grids) * 14**2 > 0.8 * MAX_PIXELS


def test_the_plain_loop_sees_what_ours_sees(examples, conversations):
    assert len(conversations) == len(examples)
    for number, example in enumerate(examples):
        theirs = conversations[number]
        assert torch.equal(theirs["input_ids"], example.input_ids)
        assert torch.equal(theirs["labels"][1:], example.targets[:-1])
        if example.grid_thw:
            assert torch.equal(theirs["image_grid_thw"], torch.tensor(example.grid_thw))
            assert torch.allclose(theirs["pixel_values"], normalise(example.patches), atol=1e-6)


def test_the_collator_pads_on_the_right(conversations):
    samples = [conversations[0], conversations[1]]
    short, long = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    batch = PadRight(pad_id=7, image_id=4012)([short, long])
    length = len(short["input_ids"])
    assert torch.equal(batch["input_ids"][0, :length], short["input_ids"])
    assert torch.equal(batch["input_ids"][1], long["input_ids"])
    assert (batch["input_ids"][0, length:] == 7).all()
    assert (batch["labels"][0, length:] == IGNORED).all()
    assert batch["attention_mask"].sum(1).tolist() == [length, len(long["input_ids"])]


def test_a_loop_with_the_recipes_flags_computes_more_than_is_useful(setting):
    even = replace(setting, sizes=tuple(Sizes(100, 100, ()) for _ in range(2)))
    uneven = replace(setting, sizes=(Sizes(100, 100, ()), Sizes(50, 50, ())))
    blocks = 1.3  # of 4 passes instead of 3, less for the head, which is not computed again
    assert list(work(even, 2).factors) == ["masked pairs of attention", "blocks computed again"]
    assert 1.1 < work(even, 2).factors["blocks computed again"] < blocks
    assert work(uneven, 2).surplus == pytest.approx(work(even, 2).surplus * 200 / 150, rel=0.02)
    assert 1.1 < work(uneven, 2).factors["padding"] < 200 / 150  # the rest is logits of the padding
    few = replace(setting, sizes=tuple(Sizes(100, 10, ()) for _ in range(2)))
    assert work(few, 2).factors["logits of every token"] > 1.3
    mixed = replace(setting, sizes=(Sizes(100, 10, ((1, 8, 8),)), Sizes(100, 10, ())))
    found = work(mixed, 1)
    assert found.factors["text alone"] > 1.5  # nothing in it trains
    assert found.factors["gradients through the frozen ViT"] > 1.01
    samples = Samples.of([(100, 10, [[1, 8, 8]]), (100, 10, [])])
    whole = naive_flops(read_config(setting.model), samples, stage=1)  # what torch counts
    assert found.surplus * found.useful == pytest.approx(whole, rel=1e-9)


def test_gradients_are_compared_by_part():
    ours = {"model.visual.merger.ln_q.weight": torch.ones(4), "lm_head.weight": torch.ones(9)}
    theirs = ours | {"lm_head.weight": 1.5 * torch.ones(9)}
    found = compare(theirs, ours)
    assert found.relative_difference == {"aligner": 0.0, "llm": 0.5}
    assert found.cosine == pytest.approx({"aligner": 1.0, "llm": 1.0})
    with pytest.raises(ValueError, match=r"1 of them, lm_head\.weight first"):
        compare(theirs, {"model.visual.merger.ln_q.weight": torch.ones(4)})


@pytest.mark.slow
def test_the_plain_loop_takes_our_step_where_its_batch_is_whole(setting):
    processor = Processor.from_pretrained(setting.model, Limits(max_pixels=MAX_PIXELS))
    context = RowContext(setting.model.parent)
    rows = enumerate(rows_of(setting.exact))
    batch = collate(
        [processor.encode(parse_row(row, str(n), context)) for n, row in rows], processor.config
    )
    model = load_model(setting.model, torch.float32, torch.device("cpu"))
    loss = cross_entropy(model(batch), model.head_weight, batch.targets).sum
    (loss / len(batch.targets)).backward()
    ours = {
        name: parameter.grad.flatten()
        for name, parameter in model.named_parameters()
        if GROUPS["aligner"].match(name)
    }
    theirs = gradient(SYSTEMS["transformers"], setting, 1, GLOBAL_BATCH, threads=1)
    assert compare(theirs, ours).relative_difference["aligner"] < 1e-4


@pytest.mark.slow
def test_in_stage_2_all_parameters_have_the_same_gradient(setting):
    ours, plain = (
        gradient(SYSTEMS[name], setting, 2, GLOBAL_BATCH, threads=1)
        for name in ("ours", "transformers")
    )
    found = compare(plain, ours).relative_difference
    assert set(found) == {"vit", "aligner", "llm"}
    assert max(found.values()) < 1e-4


@pytest.mark.slow
def test_a_quick_look(tmp_path, capsys):
    out = tmp_path / "peers.json"
    options = ["--quick", "--stages", "1", "--systems", "transformers", "ours", "--out", str(out)]
    assert main(options) == 0
    figures = json.loads(out.read_text())["figures"]
    whole, cut = (row["relative_difference"]["aligner"] for row in figures["gradients"])
    assert whole < 1e-4
    assert cut > 1e-2  # a mean of means
    ours, theirs = sorted(figures["speeds"], key=lambda row: row["system"])
    assert (ours["system"], theirs["system"]) == ("ours", "transformers")
    rates = [row["samples_per_second"]["median"] for row in (ours, theirs)]
    assert theirs["times"]["median"] == pytest.approx(rates[0] / rates[1], rel=1e-2)
    assert all(0.1 < row["peak_gb"]["median"] < 20 for row in (ours, theirs))
    assert theirs["samples_per_cpu_second"]["median"] > 0
    assert sum(figures["profile of ours"][0]["shares"].values()) == pytest.approx(1, abs=0.01)
    printed = capsys.readouterr().out
    assert "1 x 16  aligner" in printed and "samples/s" in printed


def test_without_ms_swift_it_is_told_how_to_get_it(monkeypatch, tmp_path, setting):
    monkeypatch.setattr(systems, "PEERS_PYTHON", tmp_path / "none" / "python")
    swift = SYSTEMS["ms-swift"]
    with pytest.raises(PeerError, match="make peers"):
        swift.start(swift.timed(setting, 2, tmp_path))


def watched(tmp_path: Path, code: str, steps: int) -> Watched:
    command = [sys.executable, "-c", code]
    return watch(command, {}, tmp_path / "log.jsonl", tmp_path / "said.txt", steps)


def test_a_process_is_watched_from_outside(tmp_path):
    code = f"""
import json, subprocess, sys, time
hold = "x = bytearray(300_000_000); import time; time.sleep(1.5)"
began = time.process_time()
while time.process_time() < began + 0.2:
    pass
child = subprocess.Popen([sys.executable, "-c", hold])
with open({str(tmp_path / "log.jsonl")!r}, "w") as file:
    print(json.dumps({{"event": "start"}}), file=file, flush=True)
    for step in range(3):
        time.sleep(0.3)
        print(json.dumps({{"loss": step}}), file=file, flush=True)
child.wait()
"""
    mine = bytearray(900_000_000)  # a child begins as a copy of its parent
    found = watched(tmp_path, code, steps=3)
    del mine
    assert [line["loss"] for line in found.lines] == [0, 1, 2]
    assert found.ended == sorted(found.ended) and len(set(found.ended)) == 3
    assert 300e6 < found.peak_bytes < 600e6
    assert found.computed == sorted(found.computed)
    assert 0.2 <= found.computed[0] < 60


def test_a_process_that_fails_or_stops_short_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(PeerError, match=r"ended with 1 after 0 of 1 steps.*no such thing"):
        watched(tmp_path, "raise SystemExit('no such thing')", steps=1)
    with pytest.raises(PeerError, match="ended with 0 after 0 of 1 steps"):
        watched(tmp_path, "pass", steps=1)


def test_a_rate_is_of_the_steps_after_the_warm_up(setting):
    watched = Watched([{}] * 3, [9.0, 11.0, 13.0], [5.0, 6.0, 7.0], 2 * 10**9)
    found = figures_of(watched, setting)
    assert found.samples_per_cpu_second == 2 * GLOBAL_BATCH / 2
    assert found.samples_per_second == 2 * GLOBAL_BATCH / 4
    assert found.tokens_per_second == setting.tokens / 4
    assert found.start_up_seconds == 9 - 2
    assert found.peak_gb == 2


def runs(samples_per_second: float) -> list[Figures]:
    return [Figures(samples_per_second, 100.0, samples_per_second, 1.0, 2.0)]


def test_a_target_that_is_missed_has_its_reason():
    speeds = table(
        {(2, "ms-swift"): runs(1.0), (2, "transformers"): runs(1.0), (2, "ours"): runs(2.5)}
    )
    speeds = [{"size": "tiny"} | row for row in speeds]
    works = [work_row("tiny", 2, Work(useful=8e9, factors={"padding": 1.25}), samples=4)]
    profiles = [{"size": "tiny", "stage": 2, "shares": {"attention": 0.4, "matrix products": 0.6}}]
    (missed,) = misses(speeds, works, profiles, peak=80e9)
    assert (missed["system"], missed["target"], missed["found"]) == ("ms-swift", 3.0, 2.5)
    assert "1.25 times the useful FLOPs (padding 1.25x)" in missed["why"]
    assert "ms-swift does 2 GFLOP, ours 5, one large matrix product 80" in missed["why"]
    assert "3x would take 2.40 times its speed" in missed["why"]
    assert "attention 40%" in missed["why"]


def test_time_is_of_the_operator_that_spends_it(tmp_path):
    def event(name: str, ts: float, dur: float, cat: str = "cpu_op") -> dict:
        return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": 1}

    events = [
        event("ProfilerStep#3", 0, 100, "user_annotation"),
        event("aten::linear", 0, 50),
        event("aten::addmm", 5, 40),
        event("aten::mul", 60, 10),
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert shares(path) == {"matrix products": 0.4, REST: 0.4, POINTWISE: 0.2}

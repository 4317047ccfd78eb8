"""bench/: every script runs, and bench/README.md says what the results say."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import table
from bench.__main__ import NEEDS_GPU, SCRIPTS
from bench.common import RESULTS, ROOT, allocated, interleaved, ratios, summary
from bench.flops import our_count, our_flops, recorded, take, tiny
from bench.linear import straightness
from bench.naive import naive_count, naive_flops, transformers_model
from bench.plot import write_chart
from vlm.cost.samples import Samples
from vlm.data.pack import Budget
from vlm.data.plan import Plan
from vlm.data.plan_report import summarise
from vlm.gradients import drop_gradients
from vlm.model import VisionLanguageModel

KEYS = ["name", "what", "target", "figures", "spread", "kind", "machine", "versions", "date"]
KEYS += ["refuted_by"]
SHARED = {"__main__", "common", "gpu", "make_lengths", "meta", "naive", "plot", "reads", "table"}
"""Files of bench/ that are no scripts of `make bench`."""
OWN_TESTS = {"miniature"}
"""It trains the demo's stages on two ranks, which has to be made first."""
SLOW = dict.fromkeys(("graft_full_size", "calibrate", "startup", "linear"), pytest.mark.slow)
"""Of many seconds even if quick."""
QUICK = [
    pytest.param(name, marks=SLOW.get(name, ()))
    for name in SCRIPTS
    if not name.startswith(NEEDS_GPU) and name not in OWN_TESTS
]


def test_every_script_is_run_by_make_bench():
    found = {path.stem for path in (ROOT / "bench").glob("*.py")}
    assert found - SHARED <= set(SCRIPTS)


@pytest.mark.parametrize("name", QUICK)
def test_a_script_runs(name, tmp_path, capsys):
    out = tmp_path / f"{name}.json"
    script = importlib.import_module(f"bench.{name}")
    assert script.main(["--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert list(result) == KEYS
    assert result["name"] == name and result["kind"] in ("measured", "derived")
    assert result["figures"] and result["refuted_by"] and "torch" in result["versions"]
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_a_quick_run_leaves_the_results_alone(monkeypatch, tmp_path):
    from bench import loss_memory

    monkeypatch.setattr("bench.common.RESULTS", tmp_path)
    assert loss_memory.main(["--quick"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_that_of_the_results():
    made = table.make()
    assert table.README.read_text(encoding="utf-8") == made, "run `python -m bench.table`"
    assert "no reason known" not in made, "a target that is missed has its reason"


def test_a_result_that_changes_shows_in_the_table(tmp_path):
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert table.make(tmp_path) == table.make()
    result = json.loads((tmp_path / "syncs.json").read_text())
    result["figures"][0]["syncs a micro-step"] = 2.0
    (tmp_path / "syncs.json").write_text(json.dumps(result))
    (line,) = set(table.make(tmp_path).splitlines()) - set(table.make().splitlines())
    assert "| 2 and 1 | **missed**" in line
    (tmp_path / "syncs.json").unlink()
    (line,) = (x for x in table.make(tmp_path).splitlines() if x.startswith("| host syncs"))
    assert "not run" in line


def test_stage_1_is_that_of_ways_which_compute_all_that_the_naive_one_does():
    rows = [
        {"way": way, "times naive": {"median": times}, "% of peak": share}
        for way, times, share in (("naive", 1, 20), ("ours", 2.4, 50), ("cached", 9, 70))
    ]
    read = {t.what: t.read({"ways": rows}) for t in table.TARGETS if t.result == "gpu_stage1"}
    plain, cached = read.values()
    assert plain.text.startswith("2.40x") and not plain.met
    assert cached.text.startswith("9.00x") and cached.met is None


def test_a_count_that_rests_on_the_frozen_vit_says_so():
    row = {"stage": 1, "times fewer": 1.9, "if naive spared the ViT": 1.7, "data": "caption"}
    rich = {"stage": 1, "times fewer": 2.4, "if naive spared the ViT": 2.2, "data": "instruction"}
    (target,) = (t for t in table.TARGETS if t.what.startswith("FLOPs, stage 1"))
    found = target.read({"all samples": [row, rich]})
    assert found.met and "met for caption only because" in found.text
    assert "only because" not in target.read({"all samples": [rich]}).text


def test_padding_and_micro_batches_that_are_not_full_show_in_a_plan():
    """Two micro-batches: of 60 and 40 tokens, the second padded, and of 20 alone."""
    plan = Plan(
        lengths=np.array([60, 40, 20]),
        patches=np.array([8, 8, 8]),
        targets=np.ones(3, np.int64),
        costs=np.ones(3),
        counts=(3,),
        weights=(1.0,),
        global_batch_size=3,
        seed=0,
        world=1,
        budget=Budget(tokens=120, patches=24),
    )
    packed, padded = (summarise(plan, [[[[0, 1], [2]]]], padded=way) for way in (False, True))
    assert packed.fill == 1
    assert padded.fill == pytest.approx((120 + 24) / (140 + 24))
    assert packed.fewest_micro_batches / packed.micro_batches == 0.5
    assert packed.token_use == 0.5


def test_a_dropped_gradient_is_gone_until_its_hook_is():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    hooks = drop_gradients(layer)
    layer(torch.ones(1, 2)).sum().backward()
    assert len(hooks) == 1 and layer.weight.grad is None
    hooks[0].remove()
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_what_is_compared_takes_turns():
    calls = []
    found = interleaved(2, {name: lambda n=name: calls.append(n) or len(calls) for name in "abc"})
    assert calls == list("abcbca")
    assert found == {"a": [1, 6], "b": [2, 4], "c": [3, 5]}
    assert ratios(found["a"], found["b"]) == {"median": 1.0, "least": 0.5, "most": 1.5}
    assert summary([3, 1, 2]) == {"median": 2, "least": 1, "most": 3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator rounds up")
def test_memory_is_what_is_kept_and_the_most_at_any_time():
    def work() -> torch.Tensor:
        torch.empty(3000, dtype=torch.uint8)
        return torch.empty(1000, dtype=torch.uint8)

    assert allocated(work) == (1000, 3000)


def test_flops_are_what_torch_counts_in_both_loops():
    """Of images, of text alone, and of pairs of both, in both stages."""
    config = tiny()
    rows = [
        (90, 20, [[1, 8, 12]]),
        (70, 30, []),
        (60, 9, []),
        (41, 5, []),
        (200, 7, [[1, 4, 6]] * 2),
    ]
    samples = Samples.of([*rows, (96, 40, [[2, 8, 8]])])
    with torch.device("meta"):
        ours = VisionLanguageModel(config)
    theirs = transformers_model(config)
    for stage in (1, 2):
        assert our_count(ours, samples, stage) == sum(our_flops(config, samples, stage).values())
        assert naive_count(theirs, samples, stage) == naive_flops(config, samples, stage)


def test_samples_are_taken_with_their_images():
    samples = recorded("instruction")
    few = take(samples, np.array([7, 3, 11]))
    assert few.lengths.tolist() == samples.lengths[[7, 3, 11]].tolist()
    assert few.patches.tolist() == samples.patches[[7, 3, 11]].tolist()


def test_a_bend_is_no_straight_line():
    assert straightness({1: 10, 2: 20, 3: 30})["off"] == 0
    assert straightness({x: x**2 for x in range(1, 9)})["off"] > 0.05


def test_a_chart_has_its_lines(tmp_path):
    path = tmp_path / "chart.svg"
    write_chart(path, "a < b", "x", "y", {"one": [(0, 0), (1, 2)], "two": [(0, 1), (1, 1)]})
    text = path.read_text()
    assert text.count("<circle") == 4 and "a &lt; b" in text and ">two<" in text


@pytest.mark.slow
def test_the_miniature_runs_under_both_plans(tmp_path: Path):
    from bench.miniature import main
    from tests.train.runs import write_setting

    setting = write_setting(tmp_path / "made")
    demo = tmp_path / "demo"
    (demo / "data").mkdir(parents=True)
    (demo / "graft").symlink_to(setting["model"])
    (demo / "data" / "stage1.jsonl").symlink_to(setting["dataset"][0])
    assert main(["--quick", "--demo", str(demo), "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["figures"][0]["stage"] == "stage1"

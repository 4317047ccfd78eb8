"""Stage 1 with the frozen ViT's output on disk: the same training without the ViT."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.reads import Reads
from tests.train.runs import (
    log_of,
    run_plain,
    run_ranks,
    run_until,
    same,
    weights_of,
    write_setting,
)
from tests.train.test_resume import LOSS, WEIGHT, untimed
from train.config import TrainConfig, UsageError
from train.data import later_costs
from vlm.cost import vision_flops
from vlm.data.features import FeatureCache, FeatureWriter
from vlm.data.index import build_index
from vlm.data.processor import Processor
from vlm.data.sources import open_sources
from vlm.vision import VisionTower

STEPS = 9
STAGE1 = {"freeze_vit": True, "freeze_llm": True, "max_steps": STEPS}
"""Three epochs."""


def files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*/*") if path.suffix != ".partial"]


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Patches of each micro-batch that the trunk runs over while training, and what it computes is
    on disk before the next is read."""
    seen, honest = [], VisionTower.trunk

    def counted(tower, patches, plan):
        if tower.keep:
            seen.append(len(patches))
        return honest(tower, patches, plan)

    monkeypatch.setattr(VisionTower, "trunk", counted)
    monkeypatch.setattr(
        FeatureWriter, "__call__", lambda writer, *batch: FeatureWriter.keep(writer, *batch)
    )
    return seen


def run_blind(setting: dict, out: Path, **options) -> Path:
    """A run whose cache never has anything, and so arranges its samples as one whose cache has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCache, "get", lambda *_: None)
        return run_plain(setting, out, **STAGE1 | {"feature_cache": out / "cache"} | options)


@pytest.fixture(scope="module")
def without(setting, tmp_path_factory) -> Path:
    """All is computed."""
    return run_blind(setting, tmp_path_factory.mktemp("without") / "run")


def assert_same(run: Path, without: Path) -> None:
    """In weights and log, bit for bit."""
    assert same(weights_of(run, STEPS), weights_of(without, STEPS))
    assert untimed(run) == untimed(without)


def assert_close(run: Path, without: Path) -> None:
    """The same but for the order of addition."""
    for ours, theirs in zip(log_of(run), log_of(without), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=LOSS)
        assert all(ours[name] == theirs[name] for name in ("step", "samples", "tokens", "targets"))
    ours, theirs = weights_of(run, STEPS), weights_of(without, STEPS)
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < WEIGHT


def test_the_plan_of_a_cache_learns_the_same(setting, tmp_path, without):
    """Later epochs are arranged otherwise than in a run that has no cache."""
    plain = run_plain(setting, tmp_path / "run", **STAGE1)
    assert_close(without, plain)
    assert not same(weights_of(without, STEPS), weights_of(plain, STEPS))


def test_what_later_epochs_take_by_hand(setting, tmp_path):
    """Without the tower, as far as there is room for its rows."""
    ours = Processor.from_pretrained(setting["model"])
    index, _ = build_index(open_sources(setting["dataset"]), ours)
    trains = frozenset({"aligner"})
    costs = index.costs(ours.config, trains)
    grids = iter(index.grids.tolist())
    towers = [
        sum(
            vision_flops(ours.config.vision, *next(grids), trains)["vision tower"] for _ in range(n)
        )
        for n in index.media
    ]
    size = int(index.patches.sum()) * ours.config.vision.hidden_size * 2
    options = setting | {"output_dir": tmp_path, "dtype": "bfloat16"}
    plain = TrainConfig(**options)
    assert later_costs(index, costs, plain, ours.config, trains) is None
    for room, share in ((2 * size, 1), (size / 4, 0.25)):
        cached = replace(plain, feature_cache=tmp_path / "cache", feature_cache_gb=room / 1e9)
        found = later_costs(index, costs, cached, ours.config, trains)
        assert found == pytest.approx(costs - share * np.array(towers), rel=1e-12)


def test_later_epochs_and_runs_neither_decode_nor_compute(
    setting, tmp_path, without, computed, monkeypatch
):
    """24 images of 1,088 patches: each is computed once. A damaged file is computed again."""
    cache = tmp_path / "cache"
    assert_same(run_plain(setting, tmp_path / "one", **STAGE1, feature_cache=cache), without)
    assert sum(computed) == 1088 and len(files(cache)) == 24
    computed.clear()
    torn, flipped = sorted(files(cache), key=lambda path: path.stat().st_size)[-2:]
    torn.write_bytes(torn.read_bytes()[:-1])
    content = bytearray(flipped.read_bytes())
    content[9] ^= 1
    flipped.write_bytes(content)
    assert_same(run_plain(setting, tmp_path / "two", **STAGE1, feature_cache=cache), without)
    rows = sum(path.stat().st_size - 4 for path in (torn, flipped)) // (64 * 4)
    assert sum(computed) == rows and len(files(cache)) == 24
    computed.clear()
    monkeypatch.setattr("vlm.data.media.resize", None)
    monkeypatch.setattr("train.sft.warm_up", lambda *_: None)  # which computes all, as without it
    assert_same(run_plain(setting, tmp_path / "three", **STAGE1, feature_cache=cache), without)
    assert not computed


def test_with_workers_and_another_thread_that_writes(setting, tmp_path, without):
    """What is found depends on when it was written, the result does not; the host never waits."""
    cache = tmp_path / "cache"
    with Reads() as reads:
        run = run_plain(
            setting, tmp_path / "run", **STAGE1, feature_cache=cache, dataloader_num_workers=2
        )
    assert_same(run, without)
    assert len(files(cache)) == 24 and not reads.micro_steps


def test_a_full_folder_takes_nothing_more(setting, tmp_path, computed):
    cache, limit = tmp_path / "cache", 100_000
    options = STAGE1 | {"feature_cache": cache, "feature_cache_gb": limit / 1e9}
    blind = run_blind(setting, tmp_path / "blind", feature_cache_gb=limit / 1e9)
    computed.clear()
    assert_same(run_plain(setting, tmp_path / "run", **options), blind)
    kept = [path.stat().st_size for path in files(cache)]
    assert 0 < sum(kept) <= limit and len(kept) < 24
    assert sum(computed) > 1088


def test_a_resumed_run_is_exact(setting, tmp_path, without, computed):
    """Bit for bit where it goes on with the cache or with an empty one; but for the order of
    addition where the cache is dropped or begun."""
    for name, caches in {
        "with": ("one", "one"),
        "dropped": ("one", None),
        "begun": (None, "two"),
        "lost": ("three", "four"),
    }.items():
        first, second = (cache and tmp_path / cache for cache in caches)
        run = tmp_path / name
        run_until(setting, run, 4, **STAGE1, feature_cache=first, save_steps=4)
        run_plain(setting, run, **STAGE1, feature_cache=second, save_steps=4)
        (assert_same if first and second else assert_close)(run, without)


@pytest.mark.slow
def test_ranks_and_runs_share_a_folder(setting, tmp_path, without):
    """Two ranks with a worker each, then one process that finds what they have kept."""
    cache = tmp_path / "cache"
    ranks = run_ranks(
        setting, tmp_path / "ranks", 2, **STAGE1, feature_cache=cache, dataloader_num_workers=1
    )
    assert_close(ranks, without)
    assert len(files(cache)) == 24
    assert_same(run_plain(setting, tmp_path / "alone", **STAGE1, feature_cache=cache), without)


def test_a_stream_is_cached_too(tmp_path, computed):
    setting = write_setting(tmp_path / "setting")
    options = STAGE1 | {"streaming": True, "stream_window": 2}
    plain = run_plain(setting, tmp_path / "plain", **options)
    run = run_plain(setting, tmp_path / "run", **options, feature_cache=tmp_path / "cache")
    assert_same(run, plain)
    assert sum(computed) == 1088


def test_evaluation_shows_the_pictures_themselves(setting, tmp_path, computed):
    """Shuffled and blank ones too, which are other pictures in place of those that are kept."""
    options = STAGE1 | {"max_steps": 3, "val_dataset": setting["dataset"], "eval_answers": 1}
    figures = []
    for name in (None, "cache", "cache"):
        run = tmp_path / f"run{len(figures)}"
        run_plain(setting, run, **options, feature_cache=name and tmp_path / name)
        lines = [line | {"seconds": 0, "time": 0} for line in log_of(run, "eval")]
        figures.append((lines, (run / "answers.jsonl").read_text()))
    assert figures[0] == figures[1] == figures[2]
    assert len({figures[0][0][-1][f"loss_{name}"] for name in ("true", "shuffled", "blank")}) == 3


def test_a_dry_run_tells_of_it_and_keeps_nothing(setting, tmp_path, capsys):
    cache = tmp_path / "cache"
    run_plain(setting, tmp_path / "run", **STAGE1, feature_cache=cache, dry_run=True)
    assert f"feature cache: {cache}, 0 of 100 GB used" in capsys.readouterr().out
    assert not cache.exists()
    (cache / "tower" / "ab").mkdir(parents=True)
    (cache / "tower" / "ab" / "ab12").write_bytes(bytes(2_000_000))
    run_plain(setting, tmp_path / "run", **STAGE1, feature_cache=cache, dry_run=True)
    assert f"feature cache: {cache}, 0.002 of 100 GB used" in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == ["tower"]


@pytest.mark.parametrize(
    "trains", [{"freeze_vit": False}, {"freeze_vit": True, "last_vit_layers": 1}]
)
def test_it_is_refused_where_the_vit_trains(setting, tmp_path, trains):
    with pytest.raises(UsageError, match="feature_cache needs a frozen ViT; set freeze_vit"):
        run_plain(setting, tmp_path / "run", **STAGE1 | trains, feature_cache=tmp_path / "cache")


def test_it_is_refused_where_every_bit_must_be_the_same(setting, tmp_path):
    with pytest.raises(UsageError, match="leave it or deterministic out"):
        run_plain(setting, tmp_path / "run", feature_cache=tmp_path, deterministic=True)


def test_a_folder_that_cannot_be_made_is_named(setting, tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    folder = tmp_path / "file" / "cache"
    with pytest.raises(UsageError, match=f"feature_cache: {folder}: Not a directory"):
        run_plain(setting, tmp_path / "run", **STAGE1, feature_cache=folder)

"""What is made anew: how it begins, and that its seed settles every bit."""

import pytest
import torch

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import TensorReader, load_model
from vlm.graft.options import BuildOptions
from vlm.graft.stream import build

MERGER = "model.visual.merger."
PARTS = ("ln_q.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("donors")
    return write_vision_donor(folder / "vl"), write_llm_donor(folder / "llm")


def merger_of(folder):
    reader = TensorReader(folder)
    return {part: reader.get(MERGER + part) for part in PARTS}


def grafted(donors, out, **options):
    """(merger, report's rows of it by part)."""
    report = build(*donors, out, BuildOptions(**options))
    rows = {r["name"]: r for r in report["tensors"] if r["action"] != "dropped"}
    return merger_of(out), {part: rows[MERGER + part] for part in PARTS}, report


def test_default_is_transformers_initialiser(donors, tmp_path):
    merger, rows, _ = grafted(donors, tmp_path / "hybrid")
    for part in ("mlp.0.weight", "mlp.2.weight"):
        assert merger[part].std().item() == pytest.approx(0.02, rel=0.05)
        assert merger[part].mean().item() == pytest.approx(0.0, abs=5e-4)
        assert rows[part]["fill"] == "normal"
        assert rows[part]["std"] == pytest.approx(merger[part].std(correction=0).item(), rel=1e-5)
    assert not merger["mlp.0.bias"].any() and not merger["mlp.2.bias"].any()
    assert (merger["ln_q.weight"] == 1).all()
    assert all(row["action"] == "initialised" and row["donor"] is None for row in rows.values())


def test_xavier_is_uniform_within_its_bound(donors, tmp_path):
    merger, rows, _ = grafted(donors, tmp_path / "hybrid", merger_init="xavier")
    for part in ("mlp.0.weight", "mlp.2.weight"):
        bound = (6 / sum(merger[part].shape)) ** 0.5
        assert 0.98 * bound < merger[part].abs().max().item() <= bound
        assert merger[part].std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert rows[part]["fill"] == "xavier_uniform"
    assert not merger["mlp.0.bias"].any() and not merger["mlp.2.bias"].any()
    assert (merger["ln_q.weight"] == 1).all()


def test_donor_keeps_the_input_side_and_begins_the_output_layer_anew(donors, tmp_path):
    merger, rows, report = grafted(donors, tmp_path / "hybrid", merger_init="donor")
    theirs = merger_of(donors[0])
    kept, fresh = PARTS[:3], PARTS[3:]
    for part in kept:
        assert torch.equal(merger[part], theirs[part])
        assert (rows[part]["action"], rows[part]["donor"]) == ("copied", "vision")
    assert merger["mlp.2.weight"].shape == (48, 256) != theirs["mlp.2.weight"].shape
    assert merger["mlp.2.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not merger["mlp.2.bias"].any()
    assert {rows[part]["action"] for part in fresh} == {"initialised"}
    dropped = [r["name"] for r in report["tensors"] if r["action"] == "dropped"]
    assert sorted(n for n in dropped if MERGER in n) == sorted(MERGER + part for part in fresh)
    assert any("but for its output layer" in note for note in report["notes"])
    load_model(tmp_path / "hybrid")


def test_donor_keeps_the_whole_merger_where_the_widths_are_equal(tmp_path):
    donors = write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm", hidden_size=128)
    merger, rows, report = grafted(donors, tmp_path / "hybrid", merger_init="donor")
    theirs = merger_of(donors[0])
    assert all(torch.equal(merger[part], theirs[part]) for part in PARTS)
    assert {row["action"] for row in rows.values()} == {"copied"}
    assert any("whole merger is kept" in note for note in report["notes"])


@pytest.mark.parametrize("how", ["default", "xavier", "donor"])
def test_the_seed_settles_every_bit(donors, tmp_path, how):
    files = []
    for number, seed in enumerate((5, 5, 6)):
        build(*donors, tmp_path / str(number), BuildOptions(seed=seed, merger_init=how))
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_fresh_values_are_rounded_once_to_the_dtype_that_is_written(donors, tmp_path):
    wide, _, _ = grafted(donors, tmp_path / "wide")
    narrow, rows, _ = grafted(donors, tmp_path / "narrow", dtype="bfloat16")
    assert all(torch.equal(narrow[part], wide[part].bfloat16()) for part in PARTS)
    assert {row["dtype"] for row in rows.values()} == {"BF16"}

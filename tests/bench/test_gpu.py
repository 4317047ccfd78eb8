"""The experiments for a GPU run on a CPU, too, with the smallest sizes; every way has the same
gradient."""

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu, gpu_ceilings, gpu_stage1, gpu_stage2
from bench.common import RESULTS, ROOT

SCHEMA = {"name", "what", "target", "figures", "spread", "kind", "machine", "versions", "date"}
SCHEMA |= {"refuted_by"}

ABSENT = {
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "deepspeed",
    "torchvision",
}
ABSENT |= {"yaml", "tqdm", "cv2", "fsspec", "pandas", "pyarrow", "scipy", "psutil"}
"""Packages that a machine with a GPU need not have."""


@pytest.fixture
def result(request, tmp_path):
    """Runs a script the smallest way; returns what it writes."""
    recorded = {path: path.read_bytes() for path in RESULTS.glob("gpu_*.json")}

    def run(script) -> dict:
        out = tmp_path / "result.json"
        script.main(["--quick", "--out", str(out)])
        written = json.loads(out.read_text())
        assert set(written) == SCHEMA
        assert written["name"] == script.__name__.split(".")[-1]
        return written["figures"]

    yield run
    assert {path: path.read_bytes() for path in RESULTS.glob("gpu_*.json")} == recorded


def test_nothing_is_needed_but_torch_numpy_and_pillow():
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import bench.gpu_ceilings, bench.gpu_stage1, bench.gpu_stage2
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_ceilings(result):
    figures = result(gpu_ceilings)
    assert [row["product"] for row in figures["products"]][-4:-1] == [
        "ViT, gate, padded",
        "ViT, down",
        "ViT, down, padded",
    ]
    whole, chunked = figures["loss"]
    assert chunked["peak GB beside weights"] < whole["peak GB beside weights"]


def test_stage_1(result):
    figures = result(gpu_stage1)
    (gradient,) = (value for name, value in figures.items() if "two layers" in name)
    assert set(gradient) == {"naive", "ours", "compiled", "cached"}
    assert max(gradient.values()) < 1e-5
    naive, ours, *_ = figures["ways"]
    assert ours["micro-batches"] < naive["micro-batches"]


def test_stage_2(result):
    figures = result(gpu_stage2)
    gradient = figures["gradient, relative difference from naive"]["torch.float32"]
    assert max(gradient.values()) < 1e-5
    ways = [(row["pack"], row["way"]) for row in figures["micro-batches, 8B"]]
    assert ways == [(p, w) for p in ("text", "mixed") for w in ("naive", "ours", "compiled")]


def test_packs_hold_every_sample_once_and_no_more_than_they_may():
    sizes = gpu.recorded(gpu.hybrid_8b(), "instruction", 300)
    found = list(gpu.packs(sizes, gpu.TOKENS, gpu.PATCHES))
    assert sorted(number for pack in found for number in pack) == list(range(300))
    for pack in found:
        assert sum(sizes[n][0] for n in pack) <= gpu.TOKENS
        assert sum(gpu.area(sizes[n][2]) for n in pack) <= gpu.PATCHES


def test_padding_changes_no_loss():
    config = gpu.tiny()
    model = gpu.random_model(config, ("vit", "aligner", "llm"))
    samples = [
        gpu.make_sample(config, size, seed)
        for seed, size in enumerate(gpu.recorded(config, "instruction", 4))
    ]
    packed, padded = (gpu.micro_batch(config, samples, way) for way in (False, True))
    assert len(padded.input_ids) == 4 * max(map(len, (s.ids for s in samples)))
    torch.testing.assert_close(gpu.naive(model, padded), gpu.ours(model, packed))


def test_the_fastest_policy_that_fits(monkeypatch):
    model = gpu.random_model(gpu.tiny(), ("llm",))

    def step() -> None:
        if model.language_model.recompute == "none":
            raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert gpu.set_fastest(model, step) == "pointwise-pointwise"
    with pytest.raises(MemoryError):
        gpu.set_fastest(model, lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("never")))

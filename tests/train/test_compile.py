"""`--compile`: the same run."""

from functools import partial

import torch

import train.sft
from tests.train.runs import log_of, run_plain
from vlm.checkpoint import TensorReader
from vlm.compile import compile_blocks

STEPS = 6


def test_a_compiled_run_has_the_same_losses_and_files(setting, plain_run, tmp_path, monkeypatch):
    """It saves, evaluates and ends as any other; torch's own kernels stand for fused ones."""
    compiled = partial(compile_blocks, backend="aot_eager")
    monkeypatch.setattr(train.sft, "compile_blocks", compiled)
    run = run_plain(setting, tmp_path / "run", compile=True)
    found, expected = (
        torch.tensor([line["loss"] for line in log_of(folder)]) for folder in (run, plain_run)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (TensorReader(f / f"checkpoint-{STEPS}" / "model") for f in (run, plain_run))
    assert ours.names() == theirs.names()
    for name in ours.names():
        torch.testing.assert_close(ours.get(name), theirs.get(name), rtol=1e-4, atol=1e-5)

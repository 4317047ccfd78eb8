"""What docs/recipes.md promises of each change, checked in a tree that has it.

    python -m tests.recipe_checks NAME FOLDER

`tests/test_recipes.py` runs this; FOLDER is an empty one to work in.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train.sft
import vlm.loss
from tests.tiny import write_llm_donor, write_vision_donor
from tests.train.runs import log_of, run_plain, run_until, same, weights_of, write_setting
from vlm.checkpoint import load_model, save_model
from vlm.data.collate import collate
from vlm.data.index import build_index
from vlm.data.processor import Processor
from vlm.data.sources import open_sources
from vlm.graft.__main__ import main as graft
from vlm.loss import cross_entropy

EVERY_STEP = {"save_steps": 1, "save_total_limit": 9}


def z_loss(folder: Path) -> None:
    """The gradients are those that autograd has of the written-out loss, and its squares get
    smaller."""
    hidden = torch.randn(50, 16, requires_grad=True)
    head = torch.randn(40, 16, requires_grad=True)
    targets, weights = torch.randint(0, 40, (50,)), torch.rand(50)
    logits = hidden @ head.T
    terms = F.cross_entropy(logits, targets, reduction="none")
    terms = (terms + vlm.loss.Z_LOSS * logits.logsumexp(-1).square()) * weights
    expected = torch.autograd.grad(terms.sum(), (hidden, head))
    found = cross_entropy(hidden, head, targets, weights, chunk_rows=16)
    torch.testing.assert_close(found.terms, terms.detach())
    for ours, theirs in zip(torch.autograd.grad(found.sum, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    plain = torch.autograd.grad(F.cross_entropy(hidden @ head.T, targets), hidden)[0]
    assert not torch.allclose(plain * 50, expected[0])

    setting, squares = write_setting(folder / "setting"), {}
    processor = Processor.from_pretrained(setting["model"])
    index, _ = build_index(open_sources(setting["dataset"]), processor)
    for weight in (0.0, 1.0):
        vlm.loss.Z_LOSS = weight
        run = run_plain(setting, folder / str(weight), learning_rate=1e-2, max_steps=15)
        model = load_model(run / "checkpoint-15" / "model")
        batch = collate([processor.encode(index.sample(n)) for n in range(8)], model.config)
        squares[weight] = (model(batch) @ model.head_weight.T).logsumexp(-1).square().mean()
    assert squares[1.0] < 0.9 * squares[0.0], squares


def projector(folder: Path) -> None:
    """It is grafted, trained by stage 1, saved and read back."""
    donors = write_vision_donor(folder / "vl"), write_llm_donor(folder / "llm")
    out = folder / "hybrid"
    words = ("build", "--vision", donors[0], "--llm", donors[1], "--out", out)
    assert graft([str(word) for word in words]) == 0
    setting = write_setting(folder / "setting") | {"model": out}
    run = run_plain(setting, folder / "run", freeze_vit=True, freeze_llm=True)
    before, after = load_model(out).state_dict(), weights_of(run, 6)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".merger." in name}
    assert sum(".merger.gated." in name for name in moved) == 6
    assert same(load_model(run / "checkpoint-6" / "model").state_dict(), after)


def ema(folder: Path) -> None:
    """The averages are those of the checkpoints' weights, also over a resume, and make a model."""
    train.sft.EMA_DECAY = 0.9
    setting = write_setting(folder / "setting")
    run = run_plain(setting, folder / "run", **EVERY_STEP)
    expected = load_model(setting["model"]).state_dict()
    for step in range(1, 7):
        weights = weights_of(run, step)
        expected = {name: 0.9 * expected[name] + 0.1 * weights[name] for name in expected}
    averages = load_file(run / "ema-6.safetensors")
    for name, average in expected.items():
        torch.testing.assert_close(averages[name], average, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(averages["lm_head.weight"], weights["lm_head.weight"])

    resumed = run_until(setting, folder / "resumed", 3, **EVERY_STEP)
    run_plain(setting, resumed, **EVERY_STEP)
    assert same(load_file(resumed / "ema-6.safetensors"), averages)

    last = run / "checkpoint-6" / "model"
    model = load_model(last)
    model.load_state_dict(averages, strict=False)
    save_model(folder / "averaged", model.state_dict().items(), last)
    assert same(load_model(folder / "averaged").state_dict(), averages)


def schedule(folder: Path) -> None:
    """It is an option by its name, and the rates that a run logs are its own."""
    setting = write_setting(folder / "setting")
    run = run_plain(setting, folder / "run", lr_scheduler_type="cosine_with_floor", max_steps=10)
    rates = [line["lr"]["llm/decay"] for line in log_of(run) if line["event"] == "train"]
    warm_up, after = 2, 8
    shares = [step / warm_up for step in range(warm_up)]
    shares += [0.55 + 0.45 * math.cos(math.pi * step / after) for step in range(after)]
    assert rates == pytest.approx([1e-3 * share for share in shares])


def unfreeze(folder: Path) -> None:
    """The language model's weights are as they were, bit for bit, until it trains."""
    train.sft.LLM_TRAINS_FROM = 4
    setting = write_setting(folder / "setting")
    options = EVERY_STEP | {"warmup_ratio": 0.0}
    run = run_plain(setting, folder / "run", **options)
    before = load_model(setting["model"]).state_dict()
    for step in range(1, 7):
        after = weights_of(run, step)
        for name, tensor in after.items():
            frozen = "visual" not in name and step <= 4
            assert torch.equal(tensor, before[name]) == frozen, (step, name)
    resumed = run_until(setting, folder / "resumed", 2, **options)
    run_plain(setting, resumed, **options)
    assert same(weights_of(resumed, 6), after)


CHECKS = {check.__name__: check for check in (z_loss, projector, ema, schedule, unfreeze)}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](Path(sys.argv[2]))

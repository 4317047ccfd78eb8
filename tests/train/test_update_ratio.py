"""What AdamW's last step added, found from what it left. On ranks: test_engines.py."""

import pytest
import torch

from tests.tiny import hybrid
from train import update_ratio
from train.config import TrainConfig
from train.engine import PlainEngine
from train.freeze import freeze
from train.optim import set_learning_rate
from train.update_ratio import last_update, update_ratios
from train.world import World


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_last_update_is_the_difference_of_two_weights(decay):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000, generator=generator))
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.95), weight_decay=decay)
    for updates in range(1, 4):
        optimizer.param_groups[0]["lr"] = 0.1 / updates
        before = weight.detach().clone()
        weight.grad = torch.randn(1000, generator=generator)
        optimizer.step()
        moments = (optimizer.state[weight][kind] for kind in ("exp_avg", "exp_avg_sq"))
        found = last_update(weight.detach(), *moments, updates, optimizer.param_groups[0])
        torch.testing.assert_close(found, weight.detach() - before, rtol=1e-4, atol=1e-6)


def test_chunks_change_no_ratio_and_a_step_with_rate_0_moves_nothing(tmp_path, monkeypatch):
    model = hybrid()
    config = TrainConfig("m", ["d.jsonl"], tmp_path, dtype="float32")
    engine = PlainEngine(freeze(model, config), config)

    def step(scale: float) -> dict[str, float]:
        set_learning_rate(engine.param_groups, scale)
        engine.backward(sum(p.square().sum() for p in model.parameters()))
        engine.step(torch.zeros(1, dtype=torch.float64))
        return update_ratios(engine, World.start())

    assert set(step(0.0).values()) == {0.0}
    whole = step(1.0)
    assert set(whole) == {group["name"] for group in engine.param_groups}
    assert all(ratio > 0 for ratio in whole.values())
    monkeypatch.setattr(update_ratio, "CHUNK", 100)
    assert update_ratios(engine, World.start()) == pytest.approx(whole, rel=1e-4)

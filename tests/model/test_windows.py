"""A tower's windows are not attended to one by one."""

import torch

from tests.tiny import hybrid
from vlm import attention
from vlm.vision import plan_vision


def test_a_block_makes_a_call_for_each_size_of_window_and_not_for_each_window(monkeypatch):
    tower = hybrid().visual
    grids = [(1, 58, 42), (1, 44, 62)]  # windows cut off at the right, at the foot and at both
    plan = plan_vision(grids, tower.config)
    patches = torch.randint(0, 256, (sum(h * w for _, h, w in grids), tower.config.patch_dim))
    calls = []
    honest = attention.F.scaled_dot_product_attention

    def note(query, *args, **options):
        calls.append(query.shape[0])
        return honest(query, *args, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", note)
    tower(patches.to(torch.uint8), plan)
    windows = plan.windows.lengths
    assert len(windows) > 10 * len(set(windows))
    full = len(tower.config.fullatt_block_indexes)
    windowed = tower.config.depth - full
    assert windowed and full
    assert len(calls) == windowed * len(set(windows)) + full * len(set(plan.frames.lengths))

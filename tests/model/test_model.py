"""The hybrid packed and unpacked, frozen and not, tied and not; at few rows and at none."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from tests.packing import make_sample, pack
from tests.tiny import hybrid
from vlm.batch import Batch
from vlm.loss import cross_entropy_sum
from vlm.model import packed_attention
from vlm.recompute import Policy

SAMPLES = [(9, []), (5, [(1, 4, 4)]), (12, [(1, 10, 18), (1, 6, 14)]), (30, []), (2, [(1, 2, 2)])]
IMAGE, START, END = 4012, 4009, 4010


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    special = {"image": IMAGE, "start": START, "end": END}
    return [(*make_sample(n, grids, generator, **special), grids) for n, grids in SAMPLES]


def loss_of(model, batch: Batch):
    return cross_entropy_sum(model(batch), model.head_weight, batch.targets)


def by_tower(model):
    """Flattened gradient of each tower."""
    towers = {}
    for name, parameter in model.named_parameters():
        tower = "aligner" if ".merger." in name else name.split(".")[1].split("_")[0]
        towers.setdefault(tower, []).append(parameter.grad.flatten())
    return {tower: torch.cat(grads) for tower, grads in towers.items()}


@pytest.mark.parametrize("tie", [True, False])
def test_packed_equals_one_by_one_in_loss_and_each_towers_gradient(samples, tie):
    model = hybrid(tie=tie)
    packed = loss_of(model, pack(samples, model.config, IMAGE))
    packed.backward()
    together = by_tower(model)
    model.zero_grad()
    alone = sum(loss_of(model, pack([sample], model.config, IMAGE)) for sample in samples)
    alone.backward()
    torch.testing.assert_close(packed, alone, atol=1e-3, rtol=1e-6)
    for tower, expected in by_tower(model).items():
        scale = expected.abs().max().item()
        assert scale > 0, tower
        torch.testing.assert_close(together[tower], expected, atol=2e-5 * scale, rtol=1e-3)


def test_one_sample_does_not_leak_into_the_others(samples):
    model = hybrid()
    before = model(pack(samples, model.config, IMAGE))
    ids, patches, grids = samples[2]
    changed = [*samples]
    changed[2] = (ids.where(ids > 4000, (ids + 1) % 4000), 255 - patches, grids)
    after = model(pack(changed, model.config, IMAGE))
    lengths = [len(ids) - 1 for ids, _, _ in samples]
    moved = [
        not torch.equal(a, b)
        for a, b in zip(before.split(lengths), after.split(lengths), strict=True)
    ]
    assert moved == [False, False, True, False, False]


def test_text_alone_ignores_the_dummy_image_but_joins_it_to_the_graph(samples):
    model = hybrid()
    blank = pack([samples[0]], model.config, IMAGE)
    loss = loss_of(model, blank)
    loss.backward()
    grads = [p.grad for p in model.visual.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    # a broken tower must not poison text: an empty sum, not features times zero
    with torch.no_grad():
        model.visual.merger.mlp[2].bias.fill_(torch.inf)
    assert torch.equal(loss_of(model, blank), loss)


def test_frozen_tower_runs_without_a_graph_and_same_numbers(samples):
    model = hybrid()
    batch = pack(samples, model.config, IMAGE)
    loss_of(model, batch).backward()
    expected = [p.grad.clone() for p in model.visual.merger.parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".merger." in name)
        parameter.grad = None
    saved = []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model.visual(batch.patches, batch.vision)
    merger_only = sum(saved)
    assert merger_only < 12 * features.shape[0] * model.visual.merger.mlp[0].in_features
    loss_of(model, batch).backward()
    for ours, theirs in zip(model.visual.merger.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs)
    assert all(p.grad is None for n, p in model.named_parameters() if ".merger." not in n)


@pytest.mark.parametrize("policy", get_args(Policy))
def test_rows_asked_for_are_those_of_all_rows_in_value_and_gradient(samples, policy):
    """Rows that are not asked for end at the last layer's attention, and nothing else changes."""
    model = hybrid()
    model.set_recompute(policy, policy)
    whole = pack(samples, model.config, IMAGE)
    few = whole.target_rows[3::4]
    batch = replace(whole, target_rows=few, targets=whole.targets[3::4])
    attend = packed_attention(batch.segments)
    decoder, seen = model.language_model, []
    hook = decoder.layers[-1].mlp.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    everything = decoder.norm(decoder(model.embed(batch), batch.position_ids, attend))[few]
    ours = model(batch)
    hook.remove()
    assert seen == [len(batch.input_ids), len(few)]
    torch.testing.assert_close(ours, everything, atol=1e-5, rtol=1e-5)
    gradients = []
    for hidden in (everything, ours):
        model.zero_grad()
        cross_entropy_sum(hidden, model.head_weight, batch.targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradients[1][name], expected, atol=2e-5 * scale, rtol=1e-3)


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_without_targets_has_all_gradients_and_all_are_zero(samples, policy, dtype):
    """Ranks agree on which gradients exist, also where one of them learns nothing."""
    model = hybrid().to(dtype)
    model.set_recompute(policy, policy)
    whole = pack(samples, model.config, IMAGE)
    batch = replace(whole, target_rows=whole.target_rows[:0], targets=whole.targets[:0])
    loss = loss_of(model, batch)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name

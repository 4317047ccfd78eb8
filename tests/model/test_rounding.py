"""bfloat16: norms and rope round where the donors' own code rounds."""

import torch
import torch.nn.functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.tiny import hybrid_config
from vlm.hf_config import parse_config
from vlm.layers import RMSNorm
from vlm.rope import (
    apply_mrope,
    apply_rope,
    apply_vision_rope,
    mrope_tables,
    rope_tables,
    vision_tables,
)

TEXT = parse_config(hybrid_config()).text


def test_norm_equals_the_donors_and_not_a_fused_kernel():
    x = torch.randn(64, 96).bfloat16() * 3
    ours, theirs = RMSNorm(96).bfloat16(), Qwen3RMSNorm(96).bfloat16()
    with torch.no_grad():
        ours.weight.normal_(1.0, 0.3)
        theirs.weight.copy_(ours.weight)
    assert torch.equal(ours(x), theirs(x))
    fused = F.rms_norm(x.float(), (96,), ours.weight.float(), 1e-6).bfloat16()
    assert not torch.equal(ours(x), fused)  # the test can tell one rounding from two


def test_rope_of_text_equals_the_donors_in_bfloat16():
    q = torch.randn(50, 4, TEXT.head_dim).bfloat16()
    positions = torch.arange(50).expand(3, -1)
    cos, sin = (t.bfloat16() for t in mrope_tables(positions, TEXT))
    expected, _ = apply_rotary_pos_emb(q[None], q[None], cos[None], sin[None], unsqueeze_dim=2)
    assert torch.equal(apply_mrope(q, cos, sin), expected[0])


def test_plain_rope_and_mrope_agree_exactly_on_text():
    q = torch.randn(300, 4, TEXT.head_dim)
    positions = torch.arange(300)
    for dtype in (torch.float32, torch.bfloat16):
        x = q.to(dtype)
        plain = apply_rope(x, *(t.to(dtype) for t in rope_tables(positions, TEXT)))
        mrope = mrope_tables(positions.expand(3, -1), TEXT)
        assert torch.equal(apply_mrope(x, *(t.to(dtype) for t in mrope)), plain)


def test_mrope_follows_each_axis_in_its_section():
    """Only the frequencies of an axis move with that axis."""
    _, base = mrope_tables(torch.tensor([[5], [5], [5]]), TEXT)
    edges = [0, 4, 10, 16]
    for axis in range(3):
        positions = torch.tensor([[5], [5], [5]])
        positions[axis] = 3000
        _, moved = mrope_tables(positions, TEXT)
        changed = (moved != base)[0]
        inside = torch.zeros(16, dtype=torch.bool)
        inside[edges[axis] : edges[axis + 1]] = True
        assert torch.equal(changed, torch.cat((inside, inside)))


def test_vision_rope_is_applied_in_float32():
    q = torch.randn(40, 2, 16).bfloat16()
    positions = torch.stack((torch.arange(40) // 8, torch.arange(40) % 8), dim=-1)
    cos, sin = vision_tables(positions, 16)
    wide = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    expected, _ = apply_rotary_pos_emb_vision(q, q, *wide)
    assert torch.equal(apply_vision_rope(q, cos, sin), expected)

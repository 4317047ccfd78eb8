"""The cost model against torch's own counter and the published sizes of the 8B hybrid."""

from collections.abc import Collection
from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import hybrid_config
from vlm.batch import Batch
from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost import (
    PARTS,
    causal_attention,
    decoder_linear,
    head_linear,
    merger_linear,
    parameter_counts,
    part_of,
    sample_flops,
    tower_attention,
    tower_linear,
)
from vlm.data.collate import collate
from vlm.data.processor import Example
from vlm.hf_config import parse_config
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel

GRIDS = [(1, 12, 20), (1, 4, 6)]  # neither is a whole number of windows
LENGTH, TARGETS = 120, 23
TRAINS = [parts for n in range(4) for parts in combinations(PARTS, n)]


@pytest.fixture(scope="module")
def eight_billion() -> VLMConfig:
    """Qwen2.5-VL-7B's tower under Qwen3-8B."""
    vision = VisionConfig(32, 1280, 16, 3420, 4096, (7, 15, 23, 31))
    text = TextConfig(151936, 4096, 12288, 36, 32, 8, 128, 1e6, mrope_section=(16, 24, 24))
    return VLMConfig(vision, text, 151655, 151656, 151652, 151653)


def example(config: VLMConfig) -> Example:
    visual = sum(t * h * w for t, h, w in GRIDS) // config.vision.merge_unit
    ids = torch.zeros(LENGTH, dtype=torch.int64)
    ids[:visual] = config.image_token_id
    targets = torch.full((LENGTH,), -100)
    targets[-TARGETS:] = 1
    patches = torch.zeros(4 * visual, config.vision.patch_dim, dtype=torch.uint8)
    positions = torch.arange(LENGTH).expand(3, -1)
    return Example("x", ids, targets, None, positions, patches, tuple(GRIDS))


def on_meta(batch: Batch) -> Batch:
    """The batch without values, yet with the grouping of its segments, which follows from them."""
    moved = batch.to("meta")
    pairs = [(batch.segments, moved.segments)]
    pairs += [(getattr(batch.vision, n), getattr(moved.vision, n)) for n in ("windows", "frames")]
    for real, empty in pairs:
        groups, restore = real.by_length
        groups = [(n, rows if rows is None else rows.to("meta")) for n, rows in groups]
        restore = restore if restore is None else restore.to("meta")
        empty.__dict__["by_length"] = groups, restore
    return moved


def addmm_flops(_sum, left, right, **_) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(config: VLMConfig, trains: Collection[str]) -> int:
    """FLOPs that torch counts on the meta device, with every pair of attention."""
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trains)
    batch = on_meta(collate([example(config)], config))
    in_place = {torch.ops.aten.addmm_: addmm_flops}  # the head's gradient; torch has no formula
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        hidden = model(batch)
        loss = cross_entropy_sum(hidden, model.head_weight, batch.targets)
        if trains:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trains", TRAINS, ids="+".join)
def test_a_sample_costs_what_torch_counts(trains):
    """Exactly, once the masked half of causal attention is added. A merger that trains alone
    is counted without the gradient that reaches its first norm's weight through its first map."""
    config = parse_config(hybrid_config())
    ours = sample_flops(config, LENGTH, GRIDS, TARGETS, trains)
    passes = 3 if trains else 1
    text = config.text
    width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    ours += passes * (4 * width * LENGTH**2 - causal_attention(text, LENGTH))
    if "aligner" in trains and "vit" not in trains:
        visual = sum(t * h * w for t, h, w in GRIDS) // config.vision.merge_unit
        ours += visual * merger_linear(config.vision)[0]
    assert ours == counted(config, trains)


def test_the_8b_hybrid_has_its_published_sizes(eight_billion):
    counts = parameter_counts(eight_billion)
    text = eight_billion.text
    embedding = text.vocab_size * text.hidden_size
    blocks = counts["llm"] - 2 * embedding - text.hidden_size  # the final norm
    assert counts["vit"] == 631_975_680
    assert counts["aligner"] == 47_196_416
    assert blocks == 6_946_071_552
    assert embedding == 622_329_856
    assert sum(counts.values()) == pytest.approx(8.870e9, rel=1e-4)


def test_the_8b_hybrid_has_its_published_costs(eight_billion):
    """Forward GFLOPs per token, target token, visual token of a large image."""
    text, vision = eight_billion.text, eight_billion.vision
    assert decoder_linear(text) == pytest.approx(13.89e9, rel=1e-3)
    assert head_linear(text) == pytest.approx(1.245e9, rel=1e-3)
    assert sum(merger_linear(vision)) == pytest.approx(0.0944e9, rel=1e-3)
    height, width = 64, 80  # 5,120 patches
    embedding = 2 * vision.patch_dim * vision.hidden_size
    per_patch = tower_linear(vision) + embedding + tower_attention(vision, height, width) / 5120
    assert 4 * per_patch == pytest.approx(5.51e9, rel=2e-3)
    assert causal_attention(text, 8192) / 8192 == pytest.approx(2 * 8192 * 4096 * 36, rel=1e-3)


def test_what_trains_sets_the_factor(eight_billion):
    """PERFORMANCE's factors: stage 2 three times the forward, stage 1 twice in the decoder."""
    text = (1000, [], 100)
    forward, stage_1, stage_2 = (
        sample_flops(eight_billion, *text, trains) for trains in ((), {"aligner"}, set(PARTS))
    )
    attention = causal_attention(eight_billion.text, 1000)
    assert stage_2 == 3 * forward
    assert stage_1 == 2 * (forward - attention) + 3 * attention


def test_a_tied_head_is_counted_once():
    untied = parameter_counts(parse_config(hybrid_config()))
    tied = parameter_counts(parse_config(hybrid_config(tie=True)))
    assert untied["llm"] - tied["llm"] == 4096 * 48

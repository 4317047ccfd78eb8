"""The cost model against torch's own counter and the published sizes of the 8B hybrid."""

from collections.abc import Collection, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.meta import on_meta
from tests.model.full_size import EIGHT_BILLION
from tests.tiny import hybrid_config
from vlm.config import VLMConfig
from vlm.cost import (
    PARTS,
    flops_by_module,
    names_of,
    parameter_counts,
    parameters_by_module,
    part_of,
    sample_flops,
    sample_flops_array,
    text_flops,
    vision_flops,
)
from vlm.data.collate import collate
from vlm.data.processor import Example
from vlm.hf_config import parse_config
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel

Sizes = tuple[int, Sequence[tuple[int, int, int]], int]
"""Length, grids and targets of a sample."""
SMALL: Sizes = 120, [(1, 12, 20), (1, 4, 6)], 23  # neither grid is a whole number of windows
LARGE: Sizes = 7000, [(1, 64, 80), (6, 14, 18)], 2500  # an image of max_pixels, a video
TRAINS = [parts for n in range(4) for parts in combinations(PARTS, n)]


def example(config: VLMConfig, sizes: Sizes) -> Example:
    length, grids, learnt = sizes
    visual = sum(t * h * w for t, h, w in grids) // config.vision.merge_unit
    ids = torch.zeros(length, dtype=torch.int64)
    ids[:visual] = config.image_token_id
    targets = torch.full((length,), -100)
    targets[-learnt:] = 1
    patches = torch.zeros(4 * visual, config.vision.patch_dim, dtype=torch.uint8)
    positions = torch.arange(length).expand(3, -1)
    return Example("x", ids, targets, None, positions, patches, tuple(grids))


def addmm_flops(_sum, left, right, **_) -> int:
    return 2 * left[0] * left[1] * right[1]


def names(config: VLMConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in VisionLanguageModel(config).named_parameters()]


def counted(config: VLMConfig, sizes: Sizes, trained: Collection[str]) -> int:
    """FLOPs that torch counts on the meta device, with every pair of attention."""
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    batch = on_meta(collate([example(config, sizes)], config))
    in_place = {torch.ops.aten.addmm_: addmm_flops}  # the head's gradient; torch has no formula
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        hidden = model(batch)
        loss = cross_entropy_sum(hidden, model.head_weight, batch.targets)
        if trained:
            loss.backward()
    return counter.get_total_flops()


def expected(config: VLMConfig, sizes: Sizes, trained: Collection[str]) -> float:
    """`sample_flops` and what torch counts besides: the masked half of causal attention; in the
    lowest block that trains, the gradient that reaches its first norm through its first maps."""
    text, vision, (length, grids, _) = config.text, config.vision, sizes
    trains = names_of(trained, names(config))
    counts = sample_flops(config, *sizes, trains)
    width = text.num_attention_heads * text.head_dim
    halved = text_flops(text, length, 0, trains)["causal attention"]
    counts += 4 * width * length**2 * halved / (2 * width * length * (length + 1)) - halved
    patches = sum(t * h * w for t, h, w in grids)
    norm = next((n for n in names(config) if n in trained and n.endswith(FIRST_NORMS)), "")
    if ".merger." in norm and "vit" not in trains:
        joined = vision.hidden_size * vision.merge_unit
        counts += patches // vision.merge_unit * 2 * joined**2
    if ".blocks." in norm and "model.visual.patch_embed.proj.weight" not in trained:
        counts += patches * 2 * 3 * vision.hidden_size**2
    if ".layers." in norm and "model.language_model.embed_tokens.weight" not in trained:
        heads = text.num_attention_heads + 2 * text.num_key_value_heads
        counts += length * 2 * text.hidden_size * heads * text.head_dim
    return counts


FIRST_NORMS = ("norm1.weight", "ln_q.weight", "input_layernorm.weight")
CASES = {
    "+".join(parts) or "forward": lambda name, parts=parts: part_of(name) in parts
    for parts in TRAINS
}
LAST = {
    "last blocks": lambda name: name.startswith(
        ("model.visual.blocks.3.", "model.visual.blocks.2.")
    ),
    "last layers": lambda name: name.startswith(
        ("model.language_model.layers.2.", "model.language_model.norm.", "lm_head.")
    ),
    "last layers and the merger": lambda name: name.startswith(
        ("model.language_model.layers.2.", "model.visual.merger.")
    ),
}
CASES |= LAST
CASES |= {
    "head": lambda name: name == "lm_head.weight",
    "embedding": lambda name: "embed_tokens" in name,
    "queries": lambda name: name.endswith("q_proj.weight"),
    "up in the second layer": lambda name: name.endswith("layers.1.mlp.up_proj.weight"),
    "down of the tower": lambda name: name.endswith("blocks.0.mlp.down_proj.weight"),
    "all but norms and biases": lambda name: name.endswith("weight") and "norm" not in name,
    "second map of the merger": lambda name: name.endswith("merger.mlp.2.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sample_costs_what_torch_counts(case):
    """Whatever trains: parts, the last layers, single matrices."""
    config = parse_config(hybrid_config())
    trained = [name for name in names(config) if CASES[case](name)]
    assert counted(config, SMALL, trained) == expected(config, SMALL, trained)


@pytest.mark.parametrize("trains", [(), ("aligner",), PARTS], ids=["forward", "stage1", "stage2"])
def test_a_sample_costs_what_torch_counts_at_full_size(trains):
    trained = [name for name in names(EIGHT_BILLION) if part_of(name) in trains]
    assert counted(EIGHT_BILLION, LARGE, trained) == expected(EIGHT_BILLION, LARGE, trained)


@pytest.mark.parametrize("trains", TRAINS, ids="+".join)
def test_many_samples_cost_what_each_costs(trains):
    """To the last bit, from integers as small as an index holds them in."""
    random = np.random.default_rng(0)
    samples = [
        (
            int(random.integers(1, 40_000)),
            [
                tuple(int(n) for n in random.integers(1, 60, 3) * (1, 2, 2))
                for _ in range(random.integers(0, 4))
            ],
            int(random.integers(0, 9000)),
        )
        for _ in range(300)
    ]
    lengths = np.array([length for length, _, _ in samples], np.int32)
    targets = np.array([targets for _, _, targets in samples], np.int32)
    grids = np.array([grid for _, of_one, _ in samples for grid in of_one], np.int32)
    owners = np.repeat(np.arange(300), [len(of_one) for _, of_one, _ in samples])
    together = sample_flops_array(EIGHT_BILLION, lengths, grids, owners, targets, trains)
    alone = [sample_flops(EIGHT_BILLION, *sample, trains) for sample in samples]
    assert together.tolist() == alone
    modules = flops_by_module(EIGHT_BILLION, lengths, grids, targets, trains)
    assert sum(modules.values()) == pytest.approx(sum(alone), rel=1e-12)
    none = np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    text = sample_flops_array(EIGHT_BILLION, lengths[:1], *none, targets[:1], trains)
    assert text == sample_flops(EIGHT_BILLION, int(lengths[0]), [], int(targets[0]), trains)


def test_the_8b_hybrid_has_its_published_sizes():
    modules = parameters_by_module(EIGHT_BILLION)
    assert modules == {
        "vision tower": 631_975_680,
        "merger": 47_196_416,
        "embedding": 622_329_856,
        "decoder blocks": 6_946_071_552,
        "final norm": 4096,
        "head": 622_329_856,
    }
    parts = parameter_counts(EIGHT_BILLION)
    assert parts["vit"] == modules["vision tower"] and parts["aligner"] == modules["merger"]
    assert sum(parts.values()) == sum(modules.values()) == pytest.approx(8.870e9, rel=1e-4)


def test_the_8b_hybrid_has_its_published_costs():
    """Forward GFLOPs per token, target token, visual token of a large image."""
    text = text_flops(EIGHT_BILLION.text, 8192, 8192, ())
    image = 1, 64, 80  # 1,280 visual tokens
    vision = vision_flops(EIGHT_BILLION.vision, *image, ())
    stage_1 = vision_flops(EIGHT_BILLION.vision, *image, ("aligner",))
    assert stage_1["merger"] == pytest.approx(2.45 * vision["merger"], rel=3e-3)
    assert text["decoder linear"] / 8192 == pytest.approx(13.89e9, rel=1e-3)
    assert text["head"] / 8192 == pytest.approx(1.245e9, rel=1e-3)
    assert vision["merger"] / 1280 == pytest.approx(0.0944e9, rel=1e-3)
    assert vision["vision tower"] / 1280 == pytest.approx(5.51e9, rel=2e-3)
    assert text["causal attention"] / 8192 == pytest.approx(2 * 8192 * 4096 * 36, rel=1e-3)


def test_what_trains_sets_the_factor():
    """PERFORMANCE's factors: stage 2 three times the forward, stage 1 twice in the decoder."""
    text = (1000, [], 100)
    forward, stage_1, stage_2 = (
        sample_flops(EIGHT_BILLION, *text, trains) for trains in ((), {"aligner"}, set(PARTS))
    )
    attention = text_flops(EIGHT_BILLION.text, 1000, 0, ())["causal attention"]
    assert stage_2 == 3 * forward
    assert stage_1 == 2 * (forward - attention) + 3 * attention


def test_a_tied_head_is_counted_once():
    untied = parameter_counts(parse_config(hybrid_config()))
    tied = parameter_counts(parse_config(hybrid_config(tie=True)))
    assert untied["llm"] - tied["llm"] == 4096 * 48
    assert parameters_by_module(parse_config(hybrid_config(tie=True)))["head"] == 0

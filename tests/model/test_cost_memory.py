"""The memory model against what a real backward pass saves and allocates, byte by byte."""

from dataclasses import replace
from itertools import combinations
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from bench.common import allocated
from tests.model.full_size import EIGHT_BILLION
from tests.tiny import hybrid, hybrid_config
from train.config import TrainConfig
from train.engine import PlainEngine
from train.freeze import freeze
from vlm.batch import Batch
from vlm.config import VLMConfig
from vlm.cost import PARTS, any_trains, names_of, parameter_counts
from vlm.cost.memory import (
    BUCKET,
    Load,
    decoder_layer,
    loss_memory,
    peak_activations,
    saved_activations,
    training_state,
)
from vlm.data.collate import collate
from vlm.data.processor import Example
from vlm.hf_config import parse_config
from vlm.loss import CHUNK_ROWS, cross_entropy_sum
from vlm.model import VisionLanguageModel
from vlm.recompute import Policy

TRAINS = [parts for n in range(1, 4) for parts in combinations(PARTS, n)]
STAGES = {"stage1": ("aligner",), "stage2": PARTS}
WHOLE_WINDOWS = [(2, 16, 24)]  # one window shape: SDPA on a CPU then copies no rows, as on a GPU
TOKENS, TARGETS = 250, 23
SIZES = {torch.bfloat16: 2, torch.float32: 4}
POLICIES = [
    *zip(get_args(Policy), get_args(Policy), strict=True),
    ("pointwise", "full"),
    ("full", "none"),
]
"""Of the ViT and of the language model."""


def micro_batch(
    config: VLMConfig, grids: list[tuple[int, int, int]], tokens=TOKENS, learnt=TARGETS
) -> Batch:
    visual = sum(t * h * w for t, h, w in grids) // config.vision.merge_unit
    ids = torch.zeros(tokens, dtype=torch.int64)
    ids[:visual] = config.image_token_id
    targets = torch.full((tokens,), -100)
    targets[-learnt:] = 1
    patches = torch.zeros(4 * visual, config.vision.patch_dim, dtype=torch.uint8)
    positions = torch.arange(tokens).expand(3, -1)
    return collate([Example("x", ids, targets, None, positions, patches, tuple(grids))], config)


def saved_bytes(model: VisionLanguageModel, batch: Batch) -> int:
    """What a forward pass leaves behind with the graph of its loss."""

    def forward() -> Tensor:
        return cross_entropy_sum(model(batch), model.head_weight, batch.targets)

    forward()  # the batch's segments group themselves when first used
    held, _ = allocated(forward)
    return held - 4  # the loss


def prepared(model: VisionLanguageModel, trains, policies, dtype) -> VisionLanguageModel:
    for name, parameter in model.to(dtype).named_parameters():
        parameter.requires_grad_(any_trains(name, trains))
    model.set_recompute(*policies)
    return model


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("policies", POLICIES, ids="-".join)
@pytest.mark.parametrize("trains", TRAINS, ids="+".join)
def test_activations_are_the_bytes_that_autograd_saves(trains, policies, dtype):
    """Exactly, whatever trains; a frozen tower saves nothing."""
    model = prepared(hybrid(), trains, policies, dtype)
    (t, h, w) = WHOLE_WINDOWS[0]
    for grids, patches in ((WHOLE_WINDOWS, t * h * w), ([], 0)):
        load = Load(TOKENS, TARGETS, patches)
        saved = saved_activations(model.config, load, trains, policies, SIZES[dtype])
        assert saved_bytes(model, micro_batch(model.config, grids)) == sum(saved.values())
        assert ("vit" in trains) == bool(saved["vision tower"])


PARTLY = {
    "last blocks": ("model.visual.blocks.3.", "model.visual.blocks.2."),
    "first block": ("model.visual.patch_embed.", "model.visual.blocks.0."),
    "last layer": ("model.language_model.layers.2.", "model.language_model.norm.", "lm_head."),
    "middle layer": ("model.language_model.layers.1.", "model.visual.merger."),
}


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("policies", POLICIES[:3], ids="-".join)
@pytest.mark.parametrize("case", PARTLY)
def test_a_partly_frozen_part_saves_what_is_said(case, policies, dtype):
    """Nothing below the first block that trains, and above it less in those that do not. That
    block's first norm keeps no copy of an input without a gradient, which is said not to matter."""
    model = hybrid()
    names = [name for name, _ in model.named_parameters()]
    trains = names_of([name for name in names if name.startswith(PARTLY[case])], names)
    prepared(model, trains, policies, dtype)
    load = Load(TOKENS, TARGETS, 768)
    saved = saved_activations(model.config, load, trains, policies, SIZES[dtype])
    held = saved_bytes(model, micro_batch(model.config, WHOLE_WINDOWS))
    copies = {"last blocks": 768 * (64 + 1) * 4, "last layer": TOKENS * (48 + 1) * 4}
    assert sum(saved.values()) - held == (policies[0] == "none") * copies.get(case, 0)


@pytest.mark.parametrize("policies", POLICIES[:2], ids="-".join)
@pytest.mark.parametrize("text", [{"qk_norm": False, "qkv_bias": True}, {"mrope_section": None}])
def test_other_decoders_save_what_is_said_too(text, policies):
    config = parse_config(hybrid_config())
    config = replace(config, text=replace(config.text, **text))
    model = prepared(VisionLanguageModel(config), PARTS, policies, torch.bfloat16)
    saved = saved_activations(config, Load(TOKENS, TARGETS, 768), PARTS, policies, 2)
    assert saved_bytes(model, micro_batch(config, WHOLE_WINDOWS)) == sum(saved.values())


NARROW, WIDE = (64, 170), (192, 1000)
"""Widths of a tower or decoder and of its feed-forward layers."""
LOADS = {"logits": Load(300, 250, 4), "decoder": Load(1000, 50, 64), "both": Load(300, 20, 1024)}
"""Micro-batches that need most at different times."""


def of_widths(tower, decoder) -> VLMConfig:
    """Five layers each; small patches, since those of 14 x 14 pixels outweigh so narrow a tower."""
    base = parse_config(hybrid_config())
    text = replace(
        base.text, hidden_size=decoder[0], intermediate_size=decoder[1], num_hidden_layers=5
    )
    vision = replace(
        base.vision, patch_size=2, window_size=16, depth=5, hidden_size=tower[0],
        intermediate_size=tower[1], out_hidden_size=decoder[0],
    )  # fmt: skip
    return replace(base, vision=vision, text=text)


def peaks(stage, load: Load, policy, dtype, tower, decoder) -> tuple[int, int]:
    """Allocated and predicted bytes of a forward and a backward pass whose gradients leave at
    once, as they do under ZeRO."""
    config = of_widths(tower, decoder)
    model = prepared(VisionLanguageModel(config), STAGES[stage], (policy, policy), dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    side = int(load.patches**0.5)
    batch = micro_batch(config, [(1, side, side)], load.tokens, load.targets)

    def step() -> None:
        cross_entropy_sum(model(batch), model.head_weight, batch.targets).backward()

    predicted = peak_activations(config, load, STAGES[stage], (policy, policy), SIZES[dtype])
    return allocated(step)[1], sum(predicted.values())


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_peak_is_what_is_really_allocated(stage, load, policy, dtype):
    allocated, predicted = peaks(stage, LOADS[load], policy, dtype, NARROW, WIDE)
    assert allocated == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("dtype", SIZES, ids=str)
def test_the_peak_may_be_in_the_tower(dtype):
    """Where the tower is the wider one."""
    allocated, predicted = peaks("stage2", LOADS["both"], "full", dtype, WIDE, NARROW)
    assert allocated == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize(
    "rows", [100, CHUNK_ROWS, CHUNK_ROWS + 1, CHUNK_ROWS + 900, 3 * CHUNK_ROWS]
)
def test_the_logits_take_what_is_said(rows, dtype):
    text = replace(parse_config(hybrid_config()).text, vocab_size=4000)
    hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    weight, targets = torch.randn(4000, 8, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    _, peak = allocated(lambda: cross_entropy_sum(hidden, weight, targets))
    assert peak - hidden.nbytes == pytest.approx(loss_memory(text, rows, SIZES[dtype]), rel=0.02)


@pytest.mark.parametrize("rows", [4096, 8192, 65536, 4097])
def test_the_full_vocabularys_logits_do_not_grow(rows):
    """In bfloat16 less than 1.3 GB, however many targets there are."""
    assert loss_memory(EIGHT_BILLION.text, rows, 2) <= 6 * CHUNK_ROWS * 151_936 < 1.3e9


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_holds_what_is_said(stage, dtype, tmp_path):
    """Weights, masters, moments and gradients of the plain engine after a backward pass."""
    options = TrainConfig(
        "model", [tmp_path / "x.jsonl"], tmp_path, dtype=dtype,
        freeze_vit=stage == "stage1", freeze_llm=stage == "stage1",
    )  # fmt: skip
    model = hybrid().to(getattr(torch, dtype))
    groups = freeze(model, options)
    engine = PlainEngine(groups, options)
    batch = micro_batch(model.config, WHOLE_WINDOWS)
    engine.backward(cross_entropy_sum(model(batch), model.head_weight, batch.targets))
    held: dict[int, Tensor] = {}
    for x in (*model.parameters(), *(f.values for f in engine.fragments())):
        held[x.data_ptr()] = x
        if isinstance(x, nn.Parameter) and x.grad is not None:
            held[x.grad.data_ptr()] = x.grad
    for master in (p for group in engine.param_groups for p in group["params"]):
        held[master.grad.data_ptr()] = master.grad
    counts = parameter_counts(model.config)
    trained = sum(counts[part] for part in STAGES[stage])
    size = SIZES[getattr(torch, dtype)]
    said = training_state(sum(counts.values()), trained, 1, size)
    assert sum(x.nbytes for x in held.values()) == sum(said.values())


def test_zero_spreads_all_that_is_float32():
    """2P + 16P/N, and the bucket on top: 35.5 GB of the 8B hybrid on 8 GPUs."""
    total, merger = 8_869_907_456, 47_196_416
    all_trains = training_state(total, total, 8, 2)
    assert all_trains.pop("reduction bucket") == 2 * BUCKET + 6 * BUCKET
    assert sum(all_trains.values()) == 2 * total + 16 * total // 8
    assert sum(all_trains.values()) == pytest.approx(35.5e9, rel=2e-3)
    stage_1 = training_state(total, merger, 8, 2)
    assert stage_1.pop("reduction bucket") == 2 * BUCKET + 6 * merger
    assert sum(stage_1.values()) == pytest.approx(18e9, rel=2e-2)
    assert sum(training_state(total, total, 1, 2).values()) == 18 * total
    assert sum(training_state(total, total, 1, 4).values()) == 16 * total
    in_float32 = training_state(total, total, 8, 4)
    assert in_float32.pop("reduction bucket") == 8 * BUCKET
    assert sum(in_float32.values()) == 4 * total + 16 * total // 8


def test_the_8b_hybrid_saves_what_was_published():
    """MB per token: all of it as a HF-like model would, and under full checkpointing."""
    layers, text = EIGHT_BILLION.text.num_hidden_layers, EIGHT_BILLION.text
    assert layers * decoder_layer(text, 1, True, "none", 2) == pytest.approx(7.76e6, rel=5e-3)
    kept = saved_activations(EIGHT_BILLION, Load(10_000, 1, 0), PARTS, ("full", "full"), 2)[
        "decoder"
    ]
    assert kept / 10_000 == pytest.approx(0.295e6, rel=5e-3)

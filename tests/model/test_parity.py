"""Our towers against transformers' own, in float32 on tiny random weights.

The oracle runs one sample at a time without packing; ours runs packed.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.packing import END, IMAGE, START, VIDEO, make_sample, pack
from tests.tiny import randomise
from vlm.batch import Segments
from vlm.checkpoint import load_language_model, load_model
from vlm.loss import cross_entropy_sum
from vlm.rope import mrope_positions
from vlm.vision import normalise, plan_vision

# text, grids in patches: windows are 8 patches wide, so 6, 10, 14 and 18 fill none exactly
SAMPLES = [
    (9, []),
    (5, [(1, 4, 4)]),
    (12, [(1, 10, 18), (1, 6, 14), (1, 2, 2)]),
    (3, [(1, 16, 8)]),
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock Qwen2.5-VL with random weights, and ours loaded from what it saves."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 52,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    oracle = Qwen2_5_VLForConditionalGeneration(config).eval()
    randomise(oracle)
    folder = tmp_path_factory.mktemp("stock")
    oracle.save_pretrained(folder)
    return oracle, load_model(folder)


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(1)
    return [(*make_sample(text, grids, generator), grids) for text, grids in SAMPLES]


def oracle_logits(oracle, ids, patches, grids):
    media = {}
    if grids:
        media = {"pixel_values": normalise(patches), "image_grid_thw": torch.tensor(grids)}
    kinds = (ids == IMAGE).int()[None]
    return oracle(input_ids=ids[None], mm_token_type_ids=kinds, **media).logits[0]


def test_vision_tower_equals_transformers(stock):
    oracle, ours = stock
    grids = [(1, 4, 4), (1, 10, 18), (3, 6, 14), (1, 2, 2), (2, 16, 24)]
    count = sum(t * h * w for t, h, w in grids)
    patches = torch.randint(0, 256, (count, 1176), dtype=torch.uint8)
    expected = oracle.model.visual(normalise(patches), grid_thw=torch.tensor(grids)).pooler_output
    actual = ours.visual(patches, plan_vision(grids, ours.config.vision))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_window_plan_equals_transformers(stock):
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_position_ids,
        get_vision_window_index,
    )

    grids = [(1, 10, 18), (3, 6, 14), (1, 2, 2), (2, 16, 24), (1, 8, 8)]
    plan = plan_vision(grids, stock[1].config.vision)
    tensor = torch.tensor(grids)
    index, cu_windows = get_vision_window_index(tensor, 2, 112, 14)
    positions = get_vision_position_ids(tensor, 2).view(-1, 4, 2)[index].flatten(0, 1)
    assert torch.equal(plan.window_index, index)
    assert torch.equal(plan.windows.cu_seqlens, cu_windows)
    assert torch.equal(plan.frames.cu_seqlens, get_vision_cu_seqlens(tensor))
    assert torch.equal(plan.positions, positions)
    assert torch.equal(plan.window_index[plan.reverse_index], torch.arange(len(index)))


def test_positions_equal_transformers(stock, samples):
    oracle, ours = stock
    for ids, _, grids in samples:
        if not grids:
            continue
        expected, _ = oracle.model.get_rope_index(
            ids[None], (ids == IMAGE).int()[None], image_grid_thw=torch.tensor(grids)
        )
        assert torch.equal(mrope_positions(ids, grids, ours.config), expected[:, 0])


def test_logits_of_packed_samples_equal_transformers(stock, samples):
    oracle, ours = stock
    batch = pack(samples, ours.config)
    actual = F.linear(ours(batch), ours.head_weight)
    expected = torch.cat([oracle_logits(oracle, *sample)[:-1] for sample in samples])
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-5)


def test_gradients_of_packed_samples_equal_transformers(stock, samples):
    oracle, ours = stock
    oracle.zero_grad(), ours.zero_grad()
    batch = pack(samples, ours.config)
    loss = cross_entropy_sum(ours(batch), ours.head_weight, batch.targets, chunk_rows=7)
    loss.backward()
    expected = torch.zeros(())
    for ids, patches, grids in samples:
        logits = oracle_logits(oracle, ids, patches, grids)
        expected = expected + F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-6)
    theirs = dict(oracle.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=1e-4 * scale, rtol=1e-3, msg=name
        )


@pytest.mark.parametrize("tie", [False, True])
def test_qwen3_text_equals_transformers(tmp_path, tie):
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    oracle = Qwen3ForCausalLM(config).eval()
    randomise(oracle)
    oracle.save_pretrained(tmp_path)
    ours = load_language_model(tmp_path)
    texts = [torch.randint(0, 96, (length,)) for length in (17, 5, 17, 40)]
    packed = torch.cat(texts)
    hidden = ours(packed, Segments.of([len(t) for t in texts]), torch.arange(len(packed)))
    expected = torch.cat([oracle(text[None]).logits[0] for text in texts])
    torch.testing.assert_close(F.linear(hidden, ours.head_weight), expected, atol=5e-5, rtol=1e-5)

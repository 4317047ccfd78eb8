"""vlm/hf: the classes that travel with an export, against our own model."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import vlm.hf
from serve.witness import hf_inputs, hf_logits, our_logits
from tests.tiny import hybrid_config, write_hybrid
from vlm.checkpoint import load_model
from vlm.config import TextConfig
from vlm.data.collate import collate
from vlm.data.processor import Processor
from vlm.data.schema import IMAGE_TAG, VIDEO_TAG, Message, Sample
from vlm.generate import generate
from vlm.rope import mrope_positions


@pytest.fixture(scope="module", params=[(True, 48), (False, 48), (True, 128)], ids=str)
def pair(request, tmp_path_factory):
    """The same checkpoint as our model and as transformers', with its processor."""
    tie, hidden_size = request.param
    folder = write_hybrid(tmp_path_factory.mktemp("m") / "hybrid", tie=tie, hidden_size=hidden_size)
    theirs, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert isinstance(theirs, vlm.hf.GraftVLForConditionalGeneration)
    tied = theirs.lm_head.weight is theirs.model.language_model.embed_tokens.weight
    assert tied == tie
    return load_model(folder).eval(), theirs.eval(), Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def samples():
    from serve.parity_requests import clip, picture

    text = f"{IMAGE_TAG} or {IMAGE_TAG}, and {VIDEO_TAG}?"
    media = (picture(100, 60), picture(44, 130)), (clip(frames=131, side=56),)
    return [
        Sample("text", (Message("user", "Only words."),)),
        Sample("both", (Message("user", text),), *media),
    ]


def test_logits_and_greedy_tokens_are_ours(pair, samples):
    ours, theirs, processor = pair
    for sample in samples:
        example = processor.prompt(sample)
        torch.testing.assert_close(
            hf_logits(theirs, example, ours.config), our_logits(ours, example), atol=2e-5, rtol=1e-5
        )
        inputs = hf_inputs(example, ours.config)
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        answer = theirs.generate(**inputs, **settings, eos_token_id=None)[0, example.length :]
        batch = collate([example], ours.config)
        assert answer.tolist() == generate(ours, batch, max_new_tokens=12, stop_ids=())[0]


def test_a_batch_padded_on_the_left_is_each_of_its_rows(pair, samples):
    ours, theirs, processor = pair
    rows = [hf_inputs(processor.prompt(sample), ours.config) for sample in samples]
    longest = max(row["input_ids"].shape[1] for row in rows)
    padded = {}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        shifted = [torch.nn.functional.pad(r[name], (longest - r[name].shape[1], 0)) for r in rows]
        padded[name] = torch.cat(shifted)
    with_media = {k: v for row in rows for k, v in row.items() if k not in padded}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = theirs.generate(**padded, **with_media, **settings)[:, longest:]
    for row, answer in zip(rows, together, strict=True):
        alone = theirs.generate(**row, **settings)[0, row["input_ids"].shape[1] :]
        assert answer.tolist() == alone.tolist()


def test_positions_are_ours_for_any_grids(pair):
    ours, theirs, _ = pair
    config, generator = ours.config, torch.Generator().manual_seed(3)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    longer_than_wide = 0
    for _ in range(60):
        ids, grids, seconds = [5] * draw(0, 4), [], []
        for _ in range(draw(1, 4)):
            video = draw(0, 2) == 1
            grid = (draw(1, 12) if video else 1, 2 * draw(1, 6), 2 * draw(1, 6))
            token = config.video_token_id if video else config.image_token_id
            ids += [config.vision_start_token_id, *[token] * (grid[0] * grid[1] * grid[2] // 4)]
            ids += [config.vision_end_token_id, *[7] * draw(0, 5)]
            grids.append(grid)
            if video:
                seconds.append(torch.tensor(draw(1, 900) / 97).item())
                longer_than_wide += grid[0] * seconds[-1] * 2 > max(grid[1:]) / 2
        tokens = torch.tensor(ids)
        kinds = (tokens == config.image_token_id).int() + 2 * (tokens == config.video_token_id)
        split = [
            [g for g, video in zip(grids, is_video(ids, config), strict=True) if video == v]
            for v in (False, True)
        ]
        positions, deltas = theirs.model.get_rope_index(
            tokens[None],
            kinds[None],
            *(torch.tensor(part) if part else None for part in split),
            torch.tensor(seconds) if seconds else None,
        )
        expected = mrope_positions(tokens, grids, config, seconds)
        assert torch.equal(positions[:, 0], expected)
        assert int(deltas) == int(expected.max()) + 1 - len(ids)
    assert longer_than_wide > 20  # where transformers' own rule differs


def is_video(ids, config):
    """Whether each medium is a video, in order of appearance."""
    starts = [n + 1 for n, token in enumerate(ids) if token == config.vision_start_token_id]
    return [ids[n] == config.video_token_id for n in starts]


def test_the_config_survives_saving(tmp_path):
    raw = hybrid_config()
    config = AutoConfig.for_model(**copy.deepcopy(raw))
    assert isinstance(config, vlm.hf.GraftVLConfig)
    config.save_pretrained(tmp_path)
    text = AutoConfig.from_pretrained(tmp_path).text_config
    assert isinstance(text, vlm.hf.GraftVLTextConfig)
    for name in ("head_dim", "hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(text, name) == raw["text_config"][name]
    assert text.rope_parameters["mrope_section"] == [4, 6, 6]
    from vlm.hf_config import read_config

    ours = read_config(tmp_path).text
    assert isinstance(ours, TextConfig) and ours.qk_norm and not ours.qkv_bias

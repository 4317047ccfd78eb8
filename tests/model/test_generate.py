"""KV-cache decoding against running the whole sequence again for every token."""

import pytest
import torch
import torch.nn.functional as F

from tests.packing import make_sample, pack
from tests.tiny import hybrid
from vlm.generate import generate
from vlm.rope import mrope_positions

SAMPLES = [(9, []), (5, [(1, 4, 4)]), (3, [(1, 8, 12), (1, 6, 4)]), (30, [])]
IMAGE, START, END = 4012, 4009, 4010


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    special = {"image": IMAGE, "start": START, "end": END}
    return [(*make_sample(n, grids, generator, **special), grids) for n, grids in SAMPLES]


@torch.inference_mode()
def rerun(model, prompt, steps):
    """Greedy decoding with no cache: the whole sequence again for each token."""
    ids, patches, grids = prompt
    for _ in range(steps):
        batch = pack([(ids, patches, grids)], model.config, IMAGE)
        hidden = model.decode(batch, _causal(batch), torch.tensor([len(ids) - 1]))
        ids = torch.cat((ids, F.linear(hidden, model.head_weight).argmax(-1)))
    return ids[len(prompt[0]) :].tolist()


def _causal(batch):
    from vlm.model import packed_attention

    return packed_attention(batch.segments)


def test_greedy_batch_equals_rerunning_each_prompt(prompts):
    model = hybrid()
    batch = pack(prompts, model.config, IMAGE)
    seen = []
    outputs = generate(
        model,
        batch,
        max_new_tokens=12,
        stop_ids=(),
        on_token=lambda sample, token: seen.append((sample, token)),
    )
    assert outputs == [rerun(model, prompt, 12) for prompt in prompts]
    assert len({token for output in outputs for token in output}) > 4  # not one token over and over
    assert [token for sample, token in seen if sample == 2] == outputs[2]


def test_stops_at_stop_ids_without_returning_them(prompts):
    model = hybrid()
    batch = pack(prompts, model.config, IMAGE)
    free = generate(model, batch, max_new_tokens=8, stop_ids=())
    stop = free[1][3]
    for cut, whole in zip(
        generate(model, batch, max_new_tokens=8, stop_ids={stop}), free, strict=True
    ):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)


def test_sampling_is_seeded_and_a_tiny_nucleus_is_greedy(prompts):
    model = hybrid()
    batch = pack(prompts, model.config, IMAGE)
    options = {"max_new_tokens": 8, "stop_ids": ()}
    greedy = generate(model, batch, **options)
    warm = [generate(model, batch, temperature=1.5, seed=seed, **options) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert generate(model, batch, temperature=1.0, top_p=1e-6, **options) == greedy


def test_text_after_an_image_goes_on_at_the_largest_position(prompts):
    ids, _, grids = prompts[2]
    positions = mrope_positions(ids, grids, hybrid().config)
    # 3 text + start at 0..3, a 4 x 6 block from 4, so end and text go on at 10
    assert positions[:, 3 + 1 + 24].tolist() == [10, 10, 10]


def test_video_positions_follow_seconds_and_text_continues_after_the_longest_axis():
    config = hybrid().config
    ids = torch.tensor([1, 2, *[config.video_token_id] * 12, 5, 6])
    positions = mrope_positions(ids, [(6, 2, 4)], config, second_per_grid=[1.5])
    assert positions[0, 2:14].tolist() == [2, 2, 5, 5, 8, 8, 11, 11, 14, 14, 17, 17]
    assert positions[2, 2:14].tolist() == [2, 3] * 6
    assert positions[:, 14].tolist() == [18, 18, 18]


def test_placeholders_that_do_not_match_the_grids_are_refused():
    config = hybrid().config
    ids = torch.tensor([1, *[IMAGE] * 4, 2])
    with pytest.raises(ValueError, match="4 image placeholder tokens, but the grid has 6"):
        mrope_positions(ids, [(1, 4, 6)], config)
    with pytest.raises(ValueError, match="no image left"):
        mrope_positions(ids, [], config)
    with pytest.raises(ValueError, match="1 images or videos have no placeholder"):
        mrope_positions(ids, [(1, 4, 4), (1, 2, 2)], config)

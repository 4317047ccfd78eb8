"""Random samples, seeded: what holds for every Example and every Batch."""

import numpy as np
import pytest
import torch

from tests.data.samples import assistant, processor, sample, user, write_image
from vlm.data.collate import collate
from vlm.data.schema import BadSample

WORDS = ["cat", " dog", "\n", "  ", "7", "é", "图", "🙂", "<|im_end|>", "<think>", "def f():", "\t"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    sizes = np.random.default_rng(0).integers(10, 200, (8, 2)).tolist()
    for number, (height, width) in enumerate(sizes):
        write_image(folder / f"{number}.png", height, width, number)
    return folder


def random_sample(rng, folder, number):
    images = []

    def text(tags):
        words = [str(word) for word in rng.choice(WORDS, rng.integers(0, 12))]
        for _ in range(int(rng.integers(0, 3)) * tags):
            words.insert(int(rng.integers(len(words) + 1)), "<image>")
            images.append(f"{rng.integers(8)}.png")
        return "".join(words)

    messages = [{"role": "system", "content": text(False)}] * int(rng.integers(2))
    for _ in range(int(rng.integers(1, 4))):
        messages += [user(text(True)), assistant(text(False))]
        if rng.random() < 0.2:
            messages[-1]["loss_scale"] = float(rng.choice([0.25, 1.0, 2.0]))
    return sample(*messages, images=images, folder=folder, name=f"random:{number}")


@pytest.fixture(scope="module")
def drawn(pictures):
    rng = np.random.default_rng(1)
    samples = [random_sample(rng, pictures, number) for number in range(60)]
    assert {len(s.images) for s in samples} > {0, 1, 2}
    return samples


def test_examples(drawn):
    ours = processor()
    pad = ours.config.image_token_id
    for given in drawn:
        example = ours.encode(given)
        ids, targets = example.input_ids, example.targets
        learnt = targets != -100
        assert ids.dtype == targets.dtype == torch.int64
        assert len(targets) == example.length and not learnt[-1]
        assert torch.equal(targets[learnt], ids.roll(-1)[learnt]), "targets are the next tokens"
        assert not (targets[learnt] == pad).any(), "a placeholder is never learnt"
        patches = sum(t * h * w for t, h, w in example.grid_thw)
        assert example.patches.shape == (patches, ours.config.vision.patch_dim)
        assert (ids == pad).sum() * 4 == patches
        assert example.position_ids.shape == (3, example.length)
        text_alone = torch.arange(example.length).expand(3, -1)
        assert torch.equal(example.position_ids, text_alone) == (not given.images)
        sizes = ours.measure(given)
        assert (sizes.length, sizes.grid_thw) == (example.length, example.grid_thw)
        assert sizes.targets == learnt.sum()


def test_learnt_text_is_the_answers(drawn):
    ours = processor()
    for given in drawn:
        example = ours.encode(given)
        ids = example.targets[example.targets != -100].tolist()
        text = ours.tokenizer.decode(ids, skip_special_tokens=False)
        answers = [m.content for m in given.messages if m.role == "assistant"]
        assert text == "".join(f"{answer}<|im_end|>\n" for answer in answers)


def test_batches(drawn):
    ours = processor()
    examples = [ours.encode(given) for given in drawn]
    rng = np.random.default_rng(2)
    for _ in range(40):
        chosen = [examples[n] for n in rng.choice(len(examples), rng.integers(1, 7), False)]
        batch = collate(chosen, ours.config)
        assert batch.ids == tuple(e.id for e in chosen)
        assert batch.segments.lengths == tuple(e.length for e in chosen)
        assert all(type(n) is int for n in batch.segments.lengths + batch.vision.windows.lengths)
        assert batch.segments.cu_seqlens.tolist() == [0, *np.cumsum(batch.segments.lengths)]
        pieces = zip(
            chosen,
            batch.input_ids.split(batch.segments.lengths),
            batch.position_ids.split(batch.segments.lengths, dim=1),
            strict=True,
        )
        for example, ids, positions in pieces:
            assert torch.equal(ids, example.input_ids)
            assert torch.equal(positions, example.position_ids)
        ends = batch.segments.cu_seqlens[1:] - 1
        assert not torch.isin(batch.target_rows, ends).any(), "no sample predicts the next one"
        assert torch.equal(batch.targets, batch.input_ids[batch.target_rows + 1])
        assert len(batch.targets) == sum((e.targets != -100).sum() for e in chosen)
        has_images = any(e.grid_thw for e in chosen)
        planned = len(batch.vision.window_index)
        assert len(batch.visual_rows) == (planned if has_images else 0)
        assert len(batch.patches) == 4 * planned == sum(batch.vision.frames.lengths)
        assert (batch.input_ids[batch.visual_rows] == ours.config.image_token_id).all()
        if has_images:
            assert torch.equal(batch.patches, torch.cat([e.patches for e in chosen]))
        if batch.weights is not None:
            weights = [torch.ones(e.length) if e.weights is None else e.weights for e in chosen]
            assert torch.equal(batch.weights, torch.cat(weights)[batch.target_rows])
        else:
            assert all(e.weights is None for e in chosen)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share", [0.8, 0.4])
def test_truncation_cuts_text_and_never_an_image(drawn, side, share):
    whole = processor()
    config = whole.config
    block = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)
    outcomes = set()
    for given in drawn:
        full = whole.encode(given)
        limit = int(full.length * share)
        try:
            short = processor(max_length=limit, truncation=side).encode(given)
        except BadSample as error:
            outcomes.add(error.reason.split(",")[-1].strip())
            continue
        outcomes.add("cut")
        assert short.length == limit
        assert short.grid_thw == full.grid_thw and torch.equal(short.patches, full.patches)
        is_text = ~torch.isin(full.input_ids, torch.tensor(block))
        excess = full.length - limit
        drop = is_text.nonzero().flatten()
        drop = drop[:excess] if side == "left" else drop[-excess:]
        keep = torch.ones(full.length, dtype=torch.bool)
        keep[drop] = False
        assert torch.equal(short.input_ids, full.input_ids[keep])
    assert "cut" in outcomes
    if share < 0.5:  # too little for some images
        assert "even without its text" in outcomes


def test_too_long_is_refused_by_default_and_just_fitting_is_not(drawn):
    for given in drawn[:10]:
        length = processor().encode(given).length
        assert processor(max_length=length).encode(given).length == length
        for read in (processor(max_length=length - 1).encode, processor(max_length=1).measure):
            with pytest.raises(BadSample, match=f"{given.id}: has {length} tokens"):
                read(given)

"""Random samples: what holds for every Example and every Batch."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tests.data.samples import assistant, processor, sample, user, write_image
from vlm.data.collate import collate
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
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


TEXT = st.lists(st.characters(exclude_categories=["Cs"]) | st.sampled_from(WORDS), max_size=6).map(
    "".join
)
CLIPS = (("0.png", "0.png"), ("1.png",) * 5, ("2.png",) * 8)
"""Videos as lists of frames."""


@st.composite
def conversations(draw):
    """Messages of a row with up to three images and videos anywhere in the questions."""
    images, videos = [], []

    def question():
        words = [draw(TEXT)]
        for kind in draw(st.lists(st.sampled_from(["image", "video"]), max_size=2)):
            if kind == "image":
                images.append(f"{draw(st.integers(0, 7))}.png")
            else:
                videos.append(list(draw(st.sampled_from(CLIPS))))
            words += [f"<{kind}>", draw(TEXT)]
        return "".join(words)

    messages = [{"role": "system", "content": draw(TEXT)}] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 2))):
        weight = draw(st.sampled_from([None, 0.5, 1, 2.0]))
        keys = {} if weight is None else {"loss_scale": weight}
        messages += [user(question()), assistant(draw(TEXT), **keys)]
    return {"messages": messages, "images": images, "videos": videos}


@pytest.fixture(scope="module")
def ours():
    return processor(video_max_pixels=30_000)


@hypothesis.settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@hypothesis.given(rows=st.lists(conversations(), min_size=1, max_size=2))
def test_1000_rows_keep_the_invariants_up_to_the_batch(pictures, ours, rows):
    context = RowContext(pictures)
    samples = [parse_row(row, f"data.jsonl:{n}", context) for n, row in enumerate(rows, start=1)]
    examples = [ours.encode(one) for one in samples]
    for one, example in zip(samples, examples, strict=True):
        check_example(one, example, ours)
    batch = collate(examples, ours.config)
    lengths = [example.length for example in examples]
    ends = torch.tensor(lengths).cumsum(0) - 1
    assert batch.segments.lengths == tuple(lengths)
    assert not torch.isin(batch.target_rows, ends).any(), "no sample predicts the next one"
    assert torch.equal(batch.targets, batch.input_ids[batch.target_rows + 1])
    features = len(batch.vision.window_index)
    assert len(batch.visual_rows) == (features if any(e.grid_thw for e in examples) else 0)
    is_media = media_of(batch.input_ids, ours)
    assert torch.equal(batch.visual_rows, is_media.nonzero().flatten())
    assert len(batch.patches) == sum(batch.vision.frames.lengths) == 4 * features
    assert torch.equal(batch.vision.window_index.sort().values, torch.arange(features))
    for example, positions in zip(examples, batch.position_ids.split(lengths, dim=1), strict=True):
        assert torch.equal(positions, example.position_ids)


def media_of(ids, ours):
    config = ours.config
    return torch.isin(ids, torch.tensor([config.image_token_id, config.video_token_id]))


def check_example(one, example, ours):
    ids, learnt = example.input_ids, example.targets != -100
    is_media = media_of(ids, ours)
    assert is_media.sum() * 4 == len(example.patches)
    assert len(example.patches) == sum(t * h * w for t, h, w in example.grid_thw)
    assert len(example.grid_thw) == len(one.images) + len(one.videos)
    assert torch.equal(example.targets[learnt], ids.roll(-1)[learnt]) and not learnt[-1]
    assert not is_media.roll(-1)[learnt].any(), "a placeholder is never learnt"
    sizes = ours.measure(one)
    told = (sizes.length, sizes.targets, sizes.grid_thw)
    assert told == (example.length, int(learnt.sum()), example.grid_thw)
    positions, grids, row, free = example.position_ids, iter(example.grid_thw), 0, 0
    while row < example.length:  # text rises by one on all axes; media begin where it ended
        if not is_media[row]:
            assert positions[:, row].tolist() == [free] * 3
            row, free = row + 1, free + 1
            continue
        t, h, w = next(grids)
        block = positions[:, row : row + t * h * w // 4].view(3, t, h // 2, w // 2)
        assert (block.flatten(1).min(1).values == free).all()
        assert (block[0].flatten().diff() >= 0).all(), "time never goes back"
        for axis, side in ((1, h // 2), (2, w // 2)):
            expected = torch.arange(side) + free
            assert torch.equal(block[axis].movedim(axis, 0).flatten(1)[:, 0], expected)
        row, free = row + t * h * w // 4, int(block.max()) + 1
    assert next(grids, None) is None

"""Our ids, labels, grids, pixels and positions against the peer's (ms-swift) on the same samples.

Where ours differs on purpose the case is listed by name, and our own value is tested.
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.data.collate import collate
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.limits import Limits
from vlm.data.processor import Processor
from vlm.data.schema import BadSample
from vlm.vision import IMAGE_MEAN, IMAGE_STD

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]}
BATCHES = {b["name"]: b for b in json.loads((GOLDEN / "batches.json").read_text())["batches"]}
ARRAYS = np.load(GOLDEN / "arrays.npz")

LAST_ROUND = "loss_last_round"
"""The peer's command-line switch; ours is `loss` on each message."""
REFUSED = {
    "img_no_tag": "0 <image> tags but 1 images",
    "img_more_tags": "2 <image> tags but 1 images",
    "img_pad_literal": r"has <\|vision_start\|> in its text",
    "loss_all_false": "has nothing to learn",
    "trunc_right": "has nothing to learn",
    "role_system_mid": "only the first may",
    "size_ratio210": "more than 200 times",
    "trunc_raise": "623 tokens, more than max_length 100",
    "trunc_image_gt_max": "61 tokens, more than max_length 30",
}
"""Bad samples with a reason; the last four the peer refuses too."""
OTHER_PIXELS = ("mode_exif6_jpg", "mode_rgba_png")
"""Seen as the server sees them: upright, and on white."""
EQUAL = sorted(set(CASES) - set(REFUSED) - set(OTHER_PIXELS) - {LAST_ROUND})


def sample_of(name, row):
    text = json.dumps(row)
    while "@datauri:" in text:
        path = text.split("@datauri:")[1].split('"')[0]
        data = base64.b64encode((GOLDEN / path).read_bytes()).decode()
        text = text.replace(f"@datauri:{path}", f"data:image/png;base64,{data}")
    return parse_row(json.loads(text), name, RowContext(GOLDEN))


def processor(**options):
    if "truncation_strategy" in options:
        options["truncation"] = options.pop("truncation_strategy")
    limits = Limits(max_pixels=options.get("max_pixels", Limits.max_pixels))
    options = {k: v for k, v in options.items() if k in ("max_length", "truncation")}
    return Processor.from_pretrained(GOLDEN / "model", limits, **options)


def encode(case):
    return processor(**case["template_kwargs"]).encode(sample_of(case["name"], case["row"]))


def labels_of(example):
    """Unshifted, as the peer has them."""
    return [-100, *example.targets[:-1].tolist()]


def normalise(patches):
    mean, std = torch.tensor(IMAGE_MEAN)[:, None], torch.tensor(IMAGE_STD)[:, None]
    return ((patches.view(-1, 3, 392).float() / 255 - mean) / std).flatten(1).numpy()


def check_pixels(name, example, golden):
    pixels = normalise(example.patches)
    assert list(pixels.shape) == golden["shape"]
    if f"{name}/pixel_values" in ARRAYS:
        np.testing.assert_allclose(pixels, ARRAYS[f"{name}/pixel_values"], atol=1e-5)
    if f"{name}/pixel_row_means" in ARRAYS:
        np.testing.assert_allclose(
            pixels.mean(1, dtype=np.float64), ARRAYS[f"{name}/pixel_row_means"], atol=1e-5
        )
    assert f"{name}/pixel_values" in ARRAYS or f"{name}/pixel_row_means" in ARRAYS


@pytest.mark.parametrize("name", EQUAL)
def test_equal_to_the_peer(name):
    case = CASES[name]
    if "labels" not in case:  # a prompt
        example = processor().prompt(sample_of(name, case["row"]))
        assert set(example.targets.tolist()) == {-100}
    else:
        example = encode(case)
        assert labels_of(example) == case["labels"]
    assert example.input_ids.tolist() == case["input_ids"]
    assert example.position_ids.tolist() == np.array(case["position_ids"]).reshape(3, -1).tolist()
    assert [list(grid) for grid in example.grid_thw] == case.get("image_grid_thw", [])
    if "loss_scale" in case:
        weights = [0.0, *example.weights[:-1].tolist()]
        assert weights == case["loss_scale"]
    if "pixel_values" in case:
        check_pixels(name, example, case["pixel_values"])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_a_reason(name):
    with pytest.raises(BadSample, match=REFUSED[name]):
        encode(CASES[name])


def test_open_cases_are_all_accounted_for():
    named = {*EQUAL, *REFUSED, *OTHER_PIXELS, LAST_ROUND}
    assert named == set(CASES)


def test_last_round_is_spelt_as_loss_on_each_message():
    case = CASES[LAST_ROUND]
    row = json.loads(json.dumps(case["row"]))
    row["messages"][1]["loss"] = False
    example = processor().encode(sample_of(LAST_ROUND, row))
    assert labels_of(example) == case["labels"]


def test_loss_false_on_the_last_turn_trains_nothing_of_it():
    """The peer still trains its `<|im_end|>`."""
    row = json.loads(json.dumps(CASES["loss_false_first"]["row"]))
    row["messages"][1]["loss"], row["messages"][3]["loss"] = True, False
    example = processor().encode(sample_of("last", row))
    learnt = [label for label in labels_of(example) if label != -100]
    assert processor().tokenizer.decode(learnt, skip_special_tokens=False) == "a1<|im_end|>\n"


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_cuts_text_and_never_an_image(side):
    """The peer keeps the placeholders, but cuts the tokens that open and close them."""
    case = CASES["img_tag_middle"]
    whole = encode(case).input_ids.tolist()
    media = (4009, 4010, 4012)
    text = [i for i, index in enumerate(whole) if index not in media]
    cut = set(text[:20] if side == "left" else text[-3:])
    row = json.loads(json.dumps(case["row"]))
    limits = {"max_length": len(whole) - len(cut), "truncation_strategy": side}
    short = processor(**limits).encode(sample_of("cut", row))
    assert short.input_ids.tolist() == [x for i, x in enumerate(whole) if i not in cut]
    assert short.grid_thw == encode(case).grid_thw


@pytest.mark.parametrize("name", OTHER_PIXELS)
def test_text_of_cases_with_our_pixels_is_the_peers(name):
    """Orientation and transparency change the image, never a word or a label of the text."""
    case = CASES[name]
    example = encode(case)
    media = (4009, 4010, 4012)
    ours = [i for i in example.input_ids.tolist() if i not in media]
    assert ours == [i for i in case["input_ids"] if i not in media]
    count = sum(t * h * w for t, h, w in example.grid_thw) // 4
    assert (example.input_ids == 4012).sum() == count


def test_exif_orientation_is_applied():
    """The file holds 6: turned by 90 degrees; the peer keeps it lying."""
    example = encode(CASES["mode_exif6_jpg"])
    lying = CASES["mode_exif6_jpg"]["image_grid_thw"][0]
    assert list(example.grid_thw[0]) == [lying[0], lying[2], lying[1]]


def test_transparency_is_white():
    row = CASES["mode_rgba_png"]["row"] | {"images": ["images/rgba_transparent.png"]}
    example = processor().encode(sample_of("clear", row))
    from PIL import Image

    alpha = np.array(Image.open(GOLDEN / "images/rgba_transparent.png").convert("RGBA"))[..., 3]
    assert (alpha == 0).mean() > 0.1
    share = (example.patches.view(-1, 3, 392) == 255).all(1).float().mean().item()
    assert share == pytest.approx((alpha == 0).mean(), abs=0.1)


def unpadded(batch):
    """(ids, labels, positions) of each row of a padded batch."""
    for row, mask in enumerate(np.array(batch["attention_mask"], dtype=bool)):
        positions = np.array(batch["position_ids"])[:, row][:, mask]
        yield (
            np.array(batch["input_ids"][row])[mask],
            np.array(batch["labels"][row])[mask],
            positions,
        )


@pytest.mark.parametrize("name", sorted(BATCHES))
def test_batches_equal_the_peers(name):
    golden = BATCHES[name]
    ours = processor()
    examples = [ours.encode(sample_of(name, row)) for row in golden["rows"]]
    batch = collate(examples, ours.config)
    if "attention_mask" in golden:
        rows = list(unpadded(golden))
        ids, labels, positions = (
            np.concatenate([row[part] for row in rows], axis=-1) for part in range(3)
        )
    else:
        ids, labels = np.array(golden["input_ids"][0]), np.array(golden["labels"][0])
        positions = np.array(golden["position_ids"])[:, 0]
        assert batch.segments.cu_seqlens.tolist() == golden["cu_seq_lens_q"]
        assert batch.segments.max_length == golden["max_length_q"]
    assert batch.input_ids.tolist() == ids.tolist()
    assert batch.position_ids.tolist() == positions.tolist()
    ends = set(batch.segments.cu_seqlens.tolist())
    learnt = [(r - 1, label) for r, label in enumerate(labels) if label != -100 and r not in ends]
    assert list(zip(batch.target_rows.tolist(), batch.targets.tolist(), strict=True)) == learnt
    if "pixel_values" in golden:
        assert list(batch.patches.shape) == golden["pixel_values"]["shape"]

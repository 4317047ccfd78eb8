"""References and boxes: absolute coordinates in the image as the model sees it."""

from dataclasses import replace

import pytest

from tests.data.samples import GOLDEN, assistant, processor, user
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.schema import BadSample, check_sample

BIG, SMALL = "images/big1600x1200.jpg", "images/sq112.png"  # seen as 1148 x 840 and 112 x 112
TURNED = "images/exif6.jpg"


def parsed(question, answer, objects, images=(BIG,), **keys):
    messages = [user(question), assistant(answer)]
    row = {"messages": messages, "images": list(images), "objects": objects, **keys}
    return parse_row(row, "data.jsonl:1", RowContext(GOLDEN))


def text_of(sample, ours=None):
    """What the model reads, without the placeholders of images."""
    ours = ours or processor()
    ids = ours.encode(sample).input_ids
    ids = ids[ids != ours.config.image_token_id].tolist()
    text = ours.tokenizer.decode(ids, skip_special_tokens=False)
    return text.replace("<|vision_start|><|vision_end|>", "<image>").split("user\n")[1]


def turns(question, answer):
    return f"{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def test_references_boxes_and_points_anywhere_in_the_text():
    objects = {
        "ref": ["a dog", "图"],
        "bbox": [[160, 120, 800, 600], [1600, 1200], [0.0, 0.4, 1.5, 1199.7]],
    }
    ours = parsed("<image>Is <ref-object> in <bbox>?", "No: <ref-object><bbox>, <bbox>", objects)
    assert text_of(ours) == turns(
        "<image>Is <|object_ref_start|>a dog<|object_ref_end|> in "
        "<|box_start|>(115,84),(574,420)<|box_end|>?",
        "No: <|object_ref_start|>图<|object_ref_end|><|box_start|>(1148,840)<|box_end|>, "
        "<|box_start|>(0,0),(1,840)<|box_end|>",
    )


def test_boxes_in_an_answer_are_learnt():
    example = processor().encode(parsed("<image>", "<bbox>!", {"bbox": [[160, 120, 800, 600]]}))
    learnt = example.targets[example.targets != -100].tolist()
    text = processor().tokenizer.decode(learnt, skip_special_tokens=False)
    assert text == "<|box_start|>(115,84),(574,420)<|box_end|>!<|im_end|>\n"


def test_boxes_follow_the_pixels_that_the_image_gets():
    ours = parsed("<image>", "<bbox>", {"bbox": [[0, 0, 1600, 1200]]})
    _, height, width = processor(max_pixels=200_000).encode(ours).grid_thw[0]
    assert (height, width) < (60, 82)
    text = text_of(ours, processor(max_pixels=200_000))
    assert f"(0,0),({width * 14},{height * 14})" in text


@pytest.mark.parametrize("kind", ["real", None])
def test_boxes_in_several_images(kind):
    objects = {"bbox": [[8, 8, 56, 56], [800, 600], [16, 8]], "image_id": [1, 0, 1]}
    ours = parsed(
        "<image><image><bbox>", "<bbox><bbox>", objects | {"bbox_type": kind}, (BIG, SMALL)
    )
    box, point, other = "(8,8),(56,56)", "(574,420)", "(16,8)"
    assert text_of(ours) == turns(
        f"<image><image><|box_start|>{box}<|box_end|>",
        f"<|box_start|>{point}<|box_end|><|box_start|>{other}<|box_end|>",
    )


def test_a_video_is_no_image_that_boxes_are_in():
    clip = [["images/r42x42.png"] * 2]
    objects = {"bbox": [[800, 600], [16, 8]], "image_id": [0, 1]}
    ours = parsed("<video><image><image>", "<bbox><bbox>", objects, (BIG, SMALL), videos=clip)
    answer = text_of(ours).split("assistant\n")[1]
    boxes = "<|box_start|>(574,420)<|box_end|><|box_start|>(16,8)<|box_end|>"
    assert answer == f"{boxes}<|im_end|>\n"


def test_boxes_without_an_image_id_are_in_the_first_image():
    ours = parsed("<image><image>", "<bbox>", {"bbox": [[800, 600]]}, (BIG, SMALL))
    assert "(574,420)" in text_of(ours)


def test_boxes_given_in_shares():
    objects = {"bbox": [[0.1, 0.1, 0.5, 0.5], [1, 1]], "bbox_type": "norm1"}
    assert "(115,84),(574,420)" in text_of(parsed("<image>", "<bbox><bbox>", objects))
    assert "(1148,840)" in text_of(parsed("<image>", "<bbox><bbox>", objects))


def test_halves_are_rounded_to_even_as_python_does():
    objects = {"bbox": [[0.5, 1.5, 2.5, 3.5]]}
    assert "(0,2),(2,4)" in text_of(parsed("<image>", "<bbox>", objects, (SMALL,)))


def test_the_smaller_coordinate_is_first():
    objects = {"bbox": [[800, 600, 160, 120]]}
    assert "(115,84),(574,420)" in text_of(parsed("<image>", "<bbox>", objects))


def test_boxes_are_in_the_upright_image():
    """The peer keeps the image lying, and with it its width."""
    ours = parsed("<image>", "<bbox>", {"bbox": [[1, 1]], "bbox_type": "norm1"}, (TURNED,))
    _, height, width = processor().encode(ours).grid_thw[0]
    assert height > width
    assert f"({width * 14},{height * 14})" in text_of(ours)


def test_an_image_may_stand_between_boxes():
    objects = {"ref": ["x"], "bbox": [[8, 8], [9, 9]]}
    ours = parsed("<bbox><image><ref-object>", "<bbox>", objects, (SMALL,))
    assert text_of(ours) == turns(
        "<|box_start|>(8,8)<|box_end|><image><|object_ref_start|>x<|object_ref_end|>",
        "<|box_start|>(9,9)<|box_end|>",
    )


@pytest.mark.parametrize("objects", [None, {}, {"ref": [], "bbox": []}])
def test_without_objects_the_tags_are_text(objects):
    tags = "" if objects and "ref" in objects else "<ref-object> <bbox>"
    ours = parsed(f"<image>{tags}", "<b>", objects, (SMALL,))
    assert text_of(ours) == turns(f"<image>{tags}", "<b>")


def test_measuring_counts_the_text_of_boxes():
    ours = parsed("<image>Find <ref-object>", "<bbox>", {"ref": ["x"], "bbox": [[160, 120, 8, 6]]})
    sizes, example = processor().measure(ours), processor().encode(ours)
    assert sizes.length == example.length
    assert sizes.targets == (example.targets != -100).sum()


def test_a_conversation_cut_to_its_question_keeps_its_boxes():
    """As chat asks it; the boxes of the answer are left over."""
    objects = {"bbox": [[160, 120, 800, 600], [800, 600]]}
    ours = parsed("<image>What is in <bbox>?", "<bbox>", objects)
    asked = check_sample(replace(ours, messages=ours.messages[:1]))
    ids = processor().prompt(asked).input_ids.tolist()
    assert processor().encode(ours).input_ids.tolist()[: len(ids)] == ids


@pytest.mark.parametrize(
    ("answer", "objects", "reason"),
    [
        ("<bbox>", {"bbox": []}, "1 <bbox> tags but 0 boxes"),
        ("<bbox>", {"ref": ["a"], "bbox": [[1, 2]]}, "0 <ref-object> tags but 1 references"),
        ("<bbox>", {"bbox": [[1, 2], [3, 4]]}, "1 <bbox> tags but 2 boxes"),
        ("<ref-object>", {"bbox": []}, "1 <ref-object> tags but 0 references"),
        ("<ref-object>", {"ref": [3]}, "the reference 3"),
        ("<ref-object>", {"ref": ["<bbox>"]}, "the reference '<bbox>'"),
        ("<ref-object>", {"ref": ["<image>"]}, "2 <image> tags but 1 images"),
        ("<ref-object>", {"ref": "a"}, "ref 'a', not a list"),
        ("<bbox>", {"bbox": [[1, 2, 3]]}, "use 2 or 4 numbers"),
        ("<bbox>", {"bbox": [[1, 2, 3, 4, 5, 6, 7, 8]]}, "use 2 or 4 numbers"),
        ("<bbox>", {"bbox": [[1, float("nan")]]}, "use 2 or 4 numbers"),
        ("<bbox>", {"bbox": [[1, float("inf")]]}, "use 2 or 4 numbers"),
        ("<bbox>", {"bbox": [[1, 10**400]]}, "use 2 or 4 numbers"),
        ("<bbox>", {"bbox": [[1, True]]}, "use 2 or 4 numbers"),
        ("<bbox>", {"bbox": [["1", "2"]]}, "use 2 or 4 numbers"),
        ("<bbox>", {"bbox": [1]}, "the box 1;"),
        ("<bbox>", {"bbox": [[1, 2]], "bbox_type": "norm1000"}, "bbox_type 'norm1000'"),
        ("<bbox>", {"bbox": [[1, 2]], "image_id": [1]}, "in image 1, but 1 images"),
        ("<bbox>", {"bbox": [[1, 2]], "image_id": [-1]}, "in image -1"),
        ("<bbox>", {"bbox": [[1, 2]], "image_id": [0, 0]}, "2 image_ids for 1 boxes"),
        ("<bbox>", [[1, 2]], "use an object with ref and bbox"),
        ("<bbox>", "x", "use an object with ref and bbox"),
    ],
)
def test_what_cannot_be_placed_is_refused(answer, objects, reason):
    with pytest.raises(BadSample, match=reason):
        parsed("<image>", answer, objects)


def test_a_box_without_an_image_is_refused():
    with pytest.raises(BadSample, match="in image 0, but 0 images"):
        parsed("a", "<bbox>", {"bbox": [[1, 2]]}, ())


@pytest.mark.parametrize("box", [[0, 0, 2000, 90], [-20, 0, 5, 5], [800, 1300]])
def test_a_box_outside_its_image_is_refused(box):
    ours = parsed("<image>", "<bbox>", {"bbox": [box]})
    for work in (processor().measure, processor().encode):
        with pytest.raises(BadSample, match="not in its image of 1600 x 1200 pixels"):
            work(ours)


def test_a_box_may_reach_a_little_over_its_image():
    ours = parsed("<image>", "<bbox>", {"bbox": [[-1, -1, 113, 113]]}, (SMALL,))
    assert "(-1,-1),(113,113)" in text_of(ours)


def test_shares_above_one_are_refused():
    with pytest.raises(BadSample, match=r"norm1 box \[0.1, 5\], not in 0..1"):
        parsed("<image>", "<bbox>", {"bbox": [[0.1, 5]], "bbox_type": "norm1"})

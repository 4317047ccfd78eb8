"""ms-swift's `objects`: what `<ref-object>` and `<bbox>` tags in the messages stand for.

    {"messages": [{"role": "user", "content": "<image>Find <ref-object>."},
                  {"role": "assistant", "content": "<bbox>"}],
     "images": ["cat.jpg"],
     "objects": {"ref": ["the cat"], "bbox": [[10, 20, 110, 220]]}}

`bbox` holds boxes [x1, y1, x2, y2] and points [x, y], in pixels of the image as its file has it,
or in shares of its size (0..1) where `bbox_type` is `norm1`; `image_id` says which image each is
in, by number from 0 (default: all are in the first).
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from vlm.data.schema import BOX_TAG, BadSample, Box, Message

REF_TAG = "<ref-object>"
MOST = 1e9
"""Larger coordinates are surely a mistake."""


def parse_objects(
    objects: object, messages: Sequence[Message], images: int, sample_id: str
) -> tuple[list[Message], tuple[Box, ...]]:
    """The messages with their references in place, and the boxes in the order of their tags.

    Args:
        images: how many the sample has.

    Raises:
        BadSample: objects of another form, or not one for each tag.
    """
    if not isinstance(objects, dict):
        raise BadSample(sample_id, f"objects is {objects!r:.80}; use an object with ref and bbox")
    refs, boxes, ids = (_list(objects, key, sample_id) for key in ("ref", "bbox", "image_id"))
    for tag, given in ((REF_TAG, refs), (BOX_TAG, boxes)):
        tags = sum(message.content.count(tag) for message in messages)
        if tags != len(given):
            name = "references" if tag == REF_TAG else "boxes"
            raise BadSample(
                sample_id, f"{tags} {tag} tags but {len(given)} {name} in objects; give one each"
            )
    if bad := [ref for ref in refs if not isinstance(ref, str) or BOX_TAG in ref]:
        raise BadSample(sample_id, f"objects has the reference {bad[0]!r:.80}, not a text")
    kind = objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise BadSample(sample_id, f"objects has bbox_type {kind!r:.80}; use real or norm1")
    ids = ids or [0] * len(boxes)
    if len(ids) != len(boxes):
        raise BadSample(sample_id, f"objects has {len(ids)} image_ids for {len(boxes)} boxes")
    for number in ids:
        if type(number) is not int or not 0 <= number < images:
            raise BadSample(
                sample_id, f"objects has a box in image {number!r:.20}, but {images} images"
            )
    numbers = [_numbers(box, sample_id) for box in boxes]
    for box in numbers:  # pixels are checked where the image's size is known
        if kind == "norm1" and not all(0 <= x <= 1 for x in box):
            raise BadSample(sample_id, f"objects has the norm1 box {list(box)}, not in 0..1")
    placed = (Box(box, image, kind == "norm1") for box, image in zip(numbers, ids, strict=True))
    names = iter(refs)

    def name(_: re.Match) -> str:
        return f"<|object_ref_start|>{next(names)}<|object_ref_end|>"

    named = [replace(m, content=re.sub(REF_TAG, name, m.content)) for m in messages]
    return named, tuple(placed)


def _list(objects: dict, key: str, sample_id: str) -> list:
    value = objects.get(key) or []
    if not isinstance(value, list):
        raise BadSample(sample_id, f"objects has {key} {value!r:.80}, not a list")
    return value


def _numbers(box: object, sample_id: str) -> tuple[float, ...]:
    """Two or four numbers, the smaller first, as ms-swift's loader has them."""
    is_box = isinstance(box, list) and len(box) in (2, 4)
    if not is_box or not all(type(x) in (int, float) and -MOST < x < MOST for x in box):
        raise BadSample(sample_id, f"objects has the box {box!r:.80}; use 2 or 4 numbers")
    if len(box) == 2:
        return tuple(box)
    (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
    return left, top, right, bottom

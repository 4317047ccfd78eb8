"""Boxes in the coordinates of the image as the model sees it: absolute, after resizing.

As ms-swift has it for Qwen2.5-VL: `<|box_start|>(left,top),(right,bottom)<|box_end|>`.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from vlm.data.image import BadImage, header_size
from vlm.data.media import Medium
from vlm.data.schema import BOX_TAG, BadSample, Box, Message, Sample

OUTSIDE = 0.01
"""How far a box may reach over its image, as a share of its side, or a pixel: annotators round."""


class BoxOutside(ValueError):
    """A box that is not in its image."""


def place_boxes(sample: Sample, media: Sequence[Medium], patch_size: int) -> Sample:
    """The sample with the text of its boxes where their tags stood.

    Args:
        media: the sample's, in order of appearance.
        patch_size: pixels on a side of the patches that grids are in.

    Raises:
        BadSample: more tags than boxes, or a box outside its image; boxes left over belong to
            turns that were cut off.
    """
    if not sample.boxes:
        return sample
    images = [medium for medium in media if medium.info is None]
    boxes = iter(sample.boxes)

    def text(_: re.Match) -> str:
        box = next(boxes, None)
        if box is None:
            raise BadSample(sample.id, f"has more {BOX_TAG} tags than boxes")
        try:
            return _text(box, images[box.image], patch_size)
        except (BadImage, BoxOutside) as error:
            raise BadSample(sample.id, str(error)) from None

    def placed(message: Message) -> Message:
        return replace(message, content=re.sub(BOX_TAG, text, message.content))

    return replace(sample, messages=tuple(map(placed, sample.messages)), boxes=())


def _text(box: Box, image: Medium, patch_size: int) -> str:
    _, height, width = (count * patch_size for count in image.grid)
    full_height, full_width = (1, 1) if box.is_share else header_size(image.source)
    sizes = (full_width, full_height) * (len(box.numbers) // 2)
    for number, size in zip(box.numbers, sizes, strict=True):
        slack = max(1, OUTSIDE * size)
        if not box.is_share and not -slack <= number <= size + slack:
            raise BoxOutside(
                f"objects has the box {list(box.numbers)}, which is not in its image of "
                f"{full_width} x {full_height} pixels"
            )
    points = zip(box.numbers[::2], box.numbers[1::2], strict=True)
    # in this order of operations, whose rounding is ms-swift's
    seen = ((round(x / full_width * width), round(y / full_height * height)) for x, y in points)
    return f"<|box_start|>{','.join(f'({x},{y})' for x, y in seen)}<|box_end|>"

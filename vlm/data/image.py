"""Pixels: one definition, at training, in chat and behind a server.

uint8 RGB, EXIF orientation applied, transparency on white, resized by `smart_resize` with
torch's uint8 bicubic antialiased kernel. That is level for level what transformers' default
processor and vLLM make of the same image (Pillow's own bicubic differs by up to two levels),
without torchvision.
"""

import io
import math
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlm.config import VisionConfig
from vlm.data.schema import Media

MAX_RATIO = 200
MAX_SOURCE_PIXELS = 89_478_485
"""More than a decoder should be trusted with: Pillow's own threshold of a decompression bomb."""
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
PNG_START = 8
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
PNG_TURNING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of a PNG's texts that may hold an orientation."""


class BadImage(ValueError):
    """An image that cannot be used, and why."""


def open_image(source: Media) -> Image.Image:
    """The image's header; pixels are not decoded. BadImage names the file and the reason."""
    name = describe(source)
    try:
        check_regular(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning; the bound is below
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise BadImage(f"{name} does not exist") from None
    except IsADirectoryError:
        raise BadImage(f"{name} is a directory") from None
    except UnidentifiedImageError:  # its text has an address in it, another one on every rank
        raise BadImage(f"{name} is not an image that can be read") from None
    except Exception as error:  # noqa: BLE001 - decoders raise all kinds on damaged files
        raise BadImage(f"{name} is not an image that can be read ({error})") from None
    if image.width * image.height > MAX_SOURCE_PIXELS:
        raise BadImage(f"{name} has {image.width} x {image.height} pixels, too many to decode")
    return image


def header_size(source: Media) -> tuple[int, int]:
    """(height, width) as it will be seen, from the header alone."""
    with open_image(source) as image:
        try:
            if image.format != "PNG":
                exif = image.getexif()
            else:  # whose own `getexif` would decode it all to look for one behind the pixels
                if _turns_behind_its_pixels(image.fp):
                    image.load()
                exif = Image.Image.getexif(image)
            sideways = exif.get(ORIENTATION) in SIDEWAYS
        except Exception:  # noqa: BLE001 - damaged EXIF: no orientation
            sideways = False
        return (image.width, image.height) if sideways else (image.height, image.width)


def _turns_behind_its_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has a chunk behind its pixels that may hold an orientation."""
    place, is_behind, turns = file.tell(), False, False
    file.seek(PNG_START)
    while not turns and len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4]), head[4:]
        following = file.tell() + length + 4
        if is_behind and kind in PNG_TEXTS:
            turns = file.read(24).startswith(PNG_TURNING)
        turns = turns or (is_behind and kind == b"eXIf")
        is_behind = is_behind or kind == b"IDAT"
        file.seek(following)
    file.seek(place)
    return turns


def load_image(source: Media) -> Tensor:
    """(height, width, 3) uint8: the first frame, upright, on white."""
    with open_image(source) as image:
        try:
            image.seek(0)
            image = flatten(ImageOps.exif_transpose(image))
        except Exception as error:  # noqa: BLE001 - decoders raise all kinds on damaged files
            raise BadImage(f"{describe(source)} is damaged ({error})") from None
    return torch.from_numpy(np.array(image))


def flatten(image: Image.Image) -> Image.Image:
    """RGB, with transparency composited on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def smart_resize(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int
) -> tuple[int, int]:
    """Sides that are multiples of `factor`, near the ratio, with an area inside the bounds.

    Qwen2-VL's rule (transformers, `image_processing_qwen2_vl.smart_resize`).
    """
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise BadImage(f"{width} x {height} is more than {MAX_RATIO} times as long as wide")
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """(h, w, 3) uint8 -> (height, width, 3) uint8."""
    if pixels.shape[:2] == (height, width):
        return pixels
    channels_last = pixels.permute(2, 0, 1)[None]
    out = F.interpolate(channels_last, size=(height, width), mode="bicubic", antialias=True)
    return out[0].permute(1, 2, 0)


def patchify(pixels: Tensor, config: VisionConfig) -> Tensor:
    """An image (height, width, 3), or frames (n, height, width, 3), uint8 -> (P, patch_dim) uint8.

    In transformers' order: patches of one visual token are neighbours; inside a patch: channel,
    time, row, column. The last frame is repeated up to a whole temporal patch, so an image is its
    own second frame.
    """
    side, merge, depth = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    frames = pixels.reshape(-1, *pixels.shape[-3:])
    count, height, width, channels = frames.shape
    grid = (height // side // merge, merge, side, width // side // merge, merge)
    # planes, as `resize` leaves them; a row of a patch is copied as one value of `side` bytes
    planes = frames.permute(0, 3, 1, 2).contiguous().numpy().view(f"V{side}")
    rows = planes.reshape(count, channels, *grid).transpose(0, 2, 5, 3, 6, 1, 4)
    patches = np.ascontiguousarray(rows).reshape(count, -1, channels, side).view(np.uint8)
    patches = torch.from_numpy(patches)  # (count, patches of a frame, channels, side * side)
    out = patches.new_empty(-(-count // depth), *patches.shape[1:3], depth, side * side)
    for slot in range(depth):
        given = patches[slot::depth]
        out[: len(given), :, :, slot] = given
        out[len(given) :, :, :, slot] = patches[-1]
    return out.view(-1, channels * depth * side * side)


def check_regular(source: Media) -> None:
    """OSError where a path is no regular file: opening a pipe would wait for ever."""
    if isinstance(source, Path):
        mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        if not stat.S_ISREG(mode):
            raise OSError("a pipe, a socket or a device")


def describe(source: Media, kind: str = "an image") -> str:
    """The name of a file; what is known of mere bytes."""
    return str(source) if isinstance(source, Path) else f"{kind} of {len(source)} bytes"

"""One definition of a pixel: upright, on white, resized in uint8, cut in the donors' order."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile

from tests.data.samples import GOLDEN, damage, write_image
from vlm.config import VisionConfig
from vlm.data.image import (
    BadImage,
    header_size,
    load_image,
    open_image,
    patchify,
    resize,
    smart_resize,
)
from vlm.data.video import BadVideo, video_info

IMAGES = GOLDEN / "images"
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""EXIF orientation -> what turns the stored array upright (EXIF 2.32, tag 0x0112)."""


def stored(array, format="PNG", orientation=None) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(array).save(file, format, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied_to_pixels_and_to_the_header_size(orientation):
    array = np.random.default_rng(1).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    expected = UPRIGHT[orientation](array)
    source = stored(array, "PNG", orientation)
    assert np.array_equal(load_image(source).numpy(), expected)
    assert header_size(source) == expected.shape[:2]
    assert header_size(stored(array, "JPEG", orientation)) == expected.shape[:2]


def on_white(image: Image.Image) -> np.ndarray:
    """The compositing formula in floating point."""
    rgba = np.array(image.convert("RGBA"), dtype=np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize(
    "name", ["rgba.png", "rgba_transparent.png", "la.png", "pal_transparent.png"]
)
def test_transparency_is_composited_on_white(name):
    expected = on_white(Image.open(IMAGES / name))
    ours = load_image(IMAGES / name).numpy().astype(np.float64)
    assert np.abs(ours - expected).max() <= 0.5 + 1e-6
    dropped = np.array(Image.open(IMAGES / name).convert("RGB"), dtype=np.float64)
    assert np.abs(dropped - expected).max() > 10, "the file would not show a dropped alpha"


@pytest.mark.parametrize(
    "name", ["gray.png", "gray16.png", "bilevel.png", "pal.png", "cmyk.jpg", "anim.gif"]
)
def test_every_mode_becomes_rgb_levels(name):
    pixels = load_image(IMAGES / name)
    assert pixels.dtype == torch.uint8
    assert tuple(pixels.shape) == (*header_size(IMAGES / name), 3)
    first = Image.open(IMAGES / name)
    assert np.array_equal(pixels.numpy(), np.array(first.convert("RGB")))


def test_sizes_keep_to_the_grid_the_bounds_and_the_ratio():
    rng = np.random.default_rng(2)
    for _ in range(500):
        height, width = (int(side) for side in rng.integers(1, 4000, 2))
        if max(height, width) / min(height, width) > 200:
            continue
        h, w = smart_resize(height, width, 3136, 1003520, 28)
        assert h % 28 == 0 and w % 28 == 0
        assert 3136 <= h * w <= 1003520
        assert smart_resize(w, h, 3136, 1003520, 28) == (w, h), "a fitting size is kept"
        if min(h, w) > 280:  # rounding to 28 moves the ratio little
            assert h / w == pytest.approx(height / width, rel=0.1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (56, 56)),
        ((20, 700), (28, 700)),
        ((10, 700), (28, 476)),
        ((1200, 1600), (840, 1148)),
        ((112, 112), (112, 112)),
        ((42, 42), (56, 56)),
        ((70, 98), (56, 112)),
    ],
)
def test_sizes_are_those_of_transformers(size, expected):
    """10 x 700 tells it from qwen_vl_utils (28 x 700), 70 x 98 shows Python's rounding to even."""
    assert smart_resize(*size, 3136, 1003520, 28) == expected


def test_extreme_ratios_are_refused():
    assert smart_resize(1900, 10, 3136, 1003520, 28)
    with pytest.raises(BadImage, match="200 times"):
        smart_resize(10, 2010, 3136, 1003520, 28)


def test_resizing_is_torchs_uint8_kernel_and_a_kept_size_is_kept():
    pixels = torch.from_numpy(
        np.random.default_rng(3).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    )
    assert resize(pixels, 61, 47) is pixels
    planes = pixels.permute(2, 0, 1)[None].contiguous()
    expected = F.interpolate(planes, size=(28, 56), mode="bicubic", antialias=True)
    ours = resize(pixels, 28, 56)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, expected[0].permute(1, 2, 0))


def test_patches_are_in_transformers_order():
    config = VisionConfig(1, 8, 1, 8, 8, (0,))
    pixels = torch.from_numpy(
        np.random.default_rng(4).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    )
    expected = []
    for top in range(0, 56, 28):
        for left in range(0, 84, 28):  # one visual token
            for y in (top, top + 14):
                for x in (left, left + 14):
                    patch = pixels[y : y + 14, x : x + 14]
                    expected.append(
                        torch.stack([patch[..., c] for c in range(3) for _ in range(2)]).flatten()
                    )
    assert torch.equal(patchify(pixels, config), torch.stack(expected))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(14_200, 14_200), (40_000, 40_000)])
def test_decompression_bombs_are_refused_by_their_header(size):
    with pytest.raises(BadImage):
        open_image(png_header(*size))


def test_unusable_files_say_which_and_why(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("no image")
    write_image(tmp_path / "cut.jpg", 64, 64)
    cut = tmp_path / damage(tmp_path / "cut.jpg")
    for load, path in [
        (header_size, tmp_path / "absent.png"),
        (header_size, tmp_path),
        (header_size, text),
        (load_image, cut),
    ]:
        with pytest.raises(BadImage, match=path.name):
            load(path)
    assert header_size(cut) == (64, 64), "its header is whole"
    with pytest.raises(BadImage, match="an image of 3 bytes"):
        header_size(b"abc")


def test_a_png_is_measured_without_decoding_it(monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda s: decoded.append(s) or load(s))
    assert header_size(IMAGES / "sq112.png") == (112, 112)
    assert not decoded


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


EXIF = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
RAW = b"Raw profile type exif\0\0" + zlib.compress(
    b"\nexif\n%8d\n%s\n" % (len(EXIF) + 6, (b"Exif\0\0" + EXIF).hex().encode())
)
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    "told",
    [(b"eXIf", EXIF), (b"zTXt", RAW), (b"iTXt", XMP), (b"tEXt", b"date:create\0" + b"1" * 40)],
)
def test_a_png_is_measured_as_it_is_decoded_wherever_its_orientation_stands(told, is_late):
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    content = file.getvalue()
    place = len(content) - 12 if is_late else 33  # before IEND, or behind IHDR
    content = content[:place] + chunk(*told) + content[place:]
    size = (20, 30) if told[0] == b"tEXt" else (30, 20)
    assert header_size(content) == tuple(load_image(content).shape[:2]) == size


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadImage, match=r"pipe is not an image that can be read \(a pipe, a socket"):
        open_image(tmp_path / "pipe")
    with pytest.raises(BadVideo, match=r"pipe cannot be opened \(a pipe, a socket"):
        video_info(tmp_path / "pipe", 2.0)

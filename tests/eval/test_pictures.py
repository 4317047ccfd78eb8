"""Images of samples as they are shown on a page."""

import base64
import io
import re

import pytest
from PIL import Image

from eval.pictures import LARGEST, SIDE, picture
from tests.eval.made_up import data_uri, image_bytes


def embedded(shown: str) -> Image.Image:
    """The image that an <img> holds."""
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", shown).group(1))))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("JPEG", "L"), ("GIF", "P")])
def test_small_images_are_embedded_as_they_are(tmp_path, kind, mode):
    content = image_bytes(kind=kind, mode=mode)
    (tmp_path / "x").write_bytes(content)
    shown = picture(str(tmp_path / "x"))
    assert data_uri(content, f"image/{kind.lower()}") in shown and 'width="20" height="12"' in shown


def test_large_and_unusual_images_are_made_fit_for_a_page(tmp_path):
    noise = Image.effect_noise((2400, 600), 90).convert("RGBA")
    noise.putalpha(0)
    noise.save(tmp_path / "big.png")
    shown = embedded(picture(str(tmp_path / "big.png")))
    assert (shown.format, shown.size) == ("JPEG", (SIDE, 200))
    assert shown.getpixel((5, 5)) == (255, 255, 255)  # transparent is white
    assert (tmp_path / "big.png").stat().st_size > LARGEST
    bitmap = embedded(picture(data_uri(image_bytes(kind="BMP"), "image/bmp")))
    assert (bitmap.format, bitmap.size) == ("JPEG", (20, 12))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data:image/png;base64,###", "an image is no image that can be shown"),
        ("data:image/svg+xml,<svg onload='alert(1)'/>", "an image is no image that can be shown"),
        (data_uri(image_bytes()[:40]), "an image is no image that can be shown"),
        ("/nowhere/<x>.png", "/nowhere/&lt;x&gt;.png is gone"),
        (".", ". cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("a\0b", "cannot be read"),
    ],
)
def test_an_image_that_cannot_be_shown_says_why(source, said):
    shown = picture(source)
    assert said in shown and "<img" not in shown

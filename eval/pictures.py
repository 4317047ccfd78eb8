"""A sample's images as HTML that holds them, or says why it does not; its videos by name."""

import base64
import binascii
import io
import warnings
from pathlib import Path
from urllib.parse import unquote_to_bytes

from PIL import Image

from vlm.page import text

LARGEST = 64 * 2**10
"""Bytes of an image that is embedded as it is; a larger one is scaled down to `SIDE`."""
SIDE = 800
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


def picture(source: str) -> str:
    """HTML of a data URI or of a file's path."""
    is_data = source.startswith("data:")
    name = "an image" if is_data else source
    try:
        content = _decode(source) if is_data else Path(source).read_bytes()
    except FileNotFoundError:
        return _note(f"{name} is gone")
    except (OSError, ValueError) as error:
        return _note(f"{name} cannot be read ({error})")
    try:
        kind, shown, size = _shrink(content)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return _note(f"{name} is no image that can be shown")
    data = base64.b64encode(shown).decode()
    return (
        f'<img src="data:{kind};base64,{data}" width="{size[0]}" height="{size[1]}" '
        f'alt="image of the question">'
    )


def video(source: str) -> str:
    """HTML that names a file by its path or URL; a data URI has no name."""
    name = "without a name" if source.startswith("data:") else Path(source).name
    return _note(f"video: {name}")


def _note(message: str) -> str:
    return f'<p class="gone">{text(message)}</p>'


def _decode(uri: str) -> bytes:
    head, _, data = uri.partition(",")
    try:
        return base64.b64decode(data) if head.endswith(";base64") else unquote_to_bytes(data)
    except binascii.Error:
        raise ValueError("damaged base64") from None


def _shrink(content: bytes) -> tuple[str, bytes, tuple[int, int]]:
    """Media type, bytes and size of the image, small enough for a page with hundreds of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content))
        image.load()
    if len(content) <= LARGEST and image.format in TYPES:
        return TYPES[image.format], content, image.size
    image.thumbnail((SIDE, SIDE))
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, mask=rgba)
    out = io.BytesIO()
    canvas.save(out, "JPEG", quality=85)
    return "image/jpeg", out.getvalue(), canvas.size

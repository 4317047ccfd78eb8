"""Requests that tell apart anything that reads, resizes, places or masks otherwise.

Built in: text, images that fit and that are resized, extreme ratios, EXIF and transparency,
images interleaved with text and over several turns, and a video that is longer in time than it
is wide and whose seconds no bfloat16 holds. Or the first rows of the user's own data.
"""

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from serve.batch import split_label
from vlm.data.formats import parse_line
from vlm.data.formats.context import RowContext
from vlm.data.schema import IMAGE_TAG, VIDEO_TAG, Message, Sample
from vlm.hf_config import ConfigError

EXIF_ORIENTATION, TURNED = 0x0112, 6
VIDEO_FPS = 8


def built_in_requests() -> list[Sample]:
    """One sample per kind of request, each ending with a user's message."""
    one = lambda image: ((IMAGE_TAG + "What is this?",), (image,))  # noqa: E731
    photo, small = picture(333, 250), picture(112, 84)
    interleaved = f"First {IMAGE_TAG} then {IMAGE_TAG}\nand last {IMAGE_TAG}: which one is red?"
    requests = {
        "text": (("Name three colours. 请说出三种颜色。",), ()),
        "image as it is": one(small),
        "image enlarged": one(picture(30, 22)),
        "image resized": one(photo),
        "image above max_pixels": one(picture(1400, 1100)),
        "very wide": one(picture(700, 20)),
        "very tall": one(picture(24, 800)),
        "JPEG": one(picture(201, 99, format="JPEG")),
        "EXIF orientation": one(picture(180, 100, format="JPEG", turned=True)),
        "transparency": one(picture(90, 130, mode="RGBA")),
        "grey": one(picture(75, 75, mode="L")),
        "three interleaved": ((interleaved,), (small, photo, picture(60, 170))),
        "several turns": (
            (
                f"{IMAGE_TAG}Describe it.",
                "A picture.",
                f"And this one?{IMAGE_TAG}",
                "Another.",
                "?",
            ),
            (photo, small),
        ),
        "video": ((f"{VIDEO_TAG}What happens?",), (), (clip(frames=197, side=56),)),
        "video as frames": (
            (f"{VIDEO_TAG}And here?",),
            (),
            (tuple(picture(84, 56, seed=frame) for frame in range(3)),),
        ),
        "video, image, text": (
            (f"{IMAGE_TAG}Is this in {VIDEO_TAG}? Answer briefly.",),
            (small,),
            (clip(frames=24, side=140),),
        ),
    }
    return [_sample(name, *parts) for name, parts in requests.items()]


def _sample(name: str, texts: tuple, images: tuple, videos: tuple = ()) -> Sample:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], text) for n, text in enumerate(texts))
    return Sample(name, messages, images, videos)


def requests_from(path: Path, rows: int) -> list[Sample]:
    """The first rows of a data file, without the answers that end them, named by file and line.

    Raises:
        BadSample: a row that cannot be asked.
        ConfigError: no file, or none with rows.
    """
    samples = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and len(samples) < rows:
                    sample = parse_line(line, f"{path.name}:{number}", RowContext(path.parent))
                    samples.append(split_label(sample)[0])
    except OSError as error:
        raise ConfigError(f"--data {path} cannot be read ({error.strerror})") from None
    if not samples:
        raise ConfigError(f"--data {path} has no rows to ask")
    return samples


def picture(
    width: int,
    height: int,
    mode: str = "RGB",
    format: str = "PNG",
    turned: bool = False,
    seed: int = 0,
) -> bytes:
    """An encoded image of waves and noise: no two regions alike."""
    noise = np.random.default_rng((width, height, seed)).integers(0, 40, (height, width, 4))
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + 3 * c)) * 60 + np.cos(y / (5 + 2 * c)) * 60 + 100 for c in range(4)]
    levels = (np.stack(waves, axis=2) + noise).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(levels, "RGBA").convert(mode)
    exif = Image.Exif()
    if turned:
        exif[EXIF_ORIENTATION] = TURNED
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif)
    return buffer.getvalue()


def clip(frames: int, side: int) -> bytes:
    """An encoded video of a bright square that wanders over a grey ground."""
    import cv2

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(path), codec, VIDEO_FPS, (side, side))
        for number in range(frames):
            frame = np.full((side, side, 3), 60 + number % 90, np.uint8)
            place = number * 3 % (side - 16)
            frame[place : place + 16, side - 16 - place : side - place] = (40, 200, 250)
            writer.write(frame)
        writer.release()
        return path.read_bytes()

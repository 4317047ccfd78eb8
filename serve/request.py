"""A conversation in OpenAI's form, with images and videos that every server sees as we do."""

import base64
import io
import mimetypes
import re

from PIL import Image

from serve.conversation import without_thoughts
from vlm.data.chat import join_turns, system_text
from vlm.data.image import ORIENTATION, BadImage, load_image, open_image
from vlm.data.schema import (
    IMAGE_TAG,
    VIDEO_TAG,
    BadSample,
    Media,
    Message,
    Sample,
    Video,
    check_sample,
)

TAG = re.compile(f"({IMAGE_TAG}|{VIDEO_TAG})")
SEEN_ALIKE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
"""Formats that every server decodes as we do, where nothing is to be turned or laid on white."""


def request_messages(conversation: Sample) -> list[dict]:
    """A conversation in OpenAI's form, with images and videos as data URIs.

    Turns are joined and thoughts dropped as in a local prompt, so that the model reads the same.
    """
    conversation = without_thoughts(check_sample(conversation))
    images, videos = iter(conversation.images), iter(conversation.videos)
    system = [turn for turn in conversation.messages if turn.role == "system"]
    if system and not system[0].content:
        raise BadSample(
            conversation.id,
            "an empty system prompt cannot be asked of a server, whose template would write an "
            "empty system turn where training has none; leave it out for the default",
        )
    if conversation.boxes:
        raise BadSample(conversation.id, "has boxes, which a server cannot place in its own pixels")
    if conversation.tools:  # as text, since a server's template would write them its own way
        system = [Message("system", system_text(conversation))]
    messages = []
    for turn in [*system, *join_turns(conversation)]:
        parts = []
        for piece in TAG.split(turn.content):
            try:
                if piece == IMAGE_TAG:
                    url = image_uri(next(images))
                    parts.append({"type": "image_url", "image_url": {"url": url}})
                elif piece == VIDEO_TAG:
                    url = video_uri(next(videos))
                    parts.append({"type": "video_url", "video_url": {"url": url}})
                elif piece:
                    parts.append({"type": "text", "text": piece})
            except BadImage as error:
                raise BadSample(conversation.id, str(error)) from None
        plain = len(parts) <= 1 and TAG.search(turn.content) is None
        messages.append({"role": turn.role, "content": turn.content if plain else parts})
    return messages


def image_uri(image: Media) -> str:
    """The file as it is where every server sees in it what we see, else a PNG of our pixels.

    Servers differ in what they make of EXIF orientation and of transparency.
    """
    with open_image(image) as opened:
        alike = opened.format in SEEN_ALIKE and opened.mode in ("RGB", "L")
        if alike and "transparency" not in opened.info:
            try:
                upright = opened.getexif().get(ORIENTATION, 1) == 1
            except Exception:  # noqa: BLE001 - damaged EXIF; our own decoder decides
                upright = False
            if upright:
                data = image if isinstance(image, bytes) else image.read_bytes()
                return _data_uri(SEEN_ALIKE[opened.format], data)
    buffer = io.BytesIO()
    Image.fromarray(load_image(image).numpy()).save(buffer, "PNG")
    return _data_uri("image/png", buffer.getvalue())


def video_uri(video: Video) -> str:
    """The file as it is; a list of frames in vLLM's form, one encoded image after the other."""
    if isinstance(video, tuple):
        frames = (image_uri(frame).partition(",")[2] for frame in video)
        return f"data:video/jpeg;base64,{','.join(frames)}"
    if isinstance(video, bytes):
        return _data_uri("video/mp4", video)
    try:
        return _data_uri(mimetypes.guess_type(video.name)[0] or "video/mp4", video.read_bytes())
    except OSError as error:
        raise BadImage(f"{video} cannot be read ({error.strerror})") from None


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

"""ms-swift's format: one JSON object a line, `messages` with tags, `images` and `videos`.

    {"messages": [{"role": "user", "content": "<image>What is this?"},
                  {"role": "assistant", "content": "A cat.", "loss": true}],
     "images": ["cat.jpg"]}

`content` may also be a list of OpenAI-style parts (`text`, `image_url`, `image`, `video_url`,
`video`). Images and videos are paths relative to the data file, `file://` URLs, data URIs, or
objects with `path` or `bytes`; a video may also be a list of its frames, each given as an image.
"""

import base64
import json
from pathlib import Path

from vlm.data.schema import (
    IMAGE_TAG,
    VIDEO_TAG,
    BadSample,
    Message,
    Sample,
    Video,
    check_sample,
)

UNSUPPORTED = ("audios", "objects", "tools")
PARTS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
"""Types of content parts, and what each is."""
TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}
MAX_LOSS_SCALE = 1000
"""Larger weights are surely a mistake."""


def parse_line(line: str | bytes, sample_id: str, folder: Path) -> Sample:
    """A Sample from one line of JSON; BadSample says what is wrong with it.

    Args:
        folder: what relative paths of images and videos are relative to.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSample(sample_id, f"not a line of JSON ({error})") from None
    return parse_row(row, sample_id, folder)


def parse_row(row: object, sample_id: str, folder: Path) -> Sample:
    """A Sample from one decoded JSON object."""
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise BadSample(sample_id, "no list of messages")
    for key in UNSUPPORTED:
        if row.get(key):
            raise BadSample(sample_id, f"{key} are not supported yet")
    media = {"image": [], "video": []}
    messages = []
    for number, raw in enumerate(row["messages"]):
        content = _content(raw, number, sample_id, folder, media)
        messages.append(Message(raw["role"], content, _weight(raw, number, sample_id)))
    for kind, inline in media.items():
        listed = row.get(f"{kind}s") or []
        if not isinstance(listed, list):
            raise BadSample(sample_id, f"{kind}s is not a list")
        if inline and listed:
            raise BadSample(sample_id, f"{kind}s both in content parts and in the {kind}s list")
        inline += [_media(item, kind, sample_id, folder) for item in listed]
    images, videos = tuple(media["image"]), tuple(media["video"])
    return check_sample(Sample(sample_id, tuple(messages), images, videos))


def _content(raw: object, number: int, sample_id: str, folder: Path, media: dict) -> str:
    """Text with tags; what content parts hold is added to `media`."""
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        raise BadSample(sample_id, f"message {number} has no role")
    if raw.get("tool_calls"):
        raise BadSample(sample_id, f"message {number}: tool_calls are not supported yet")
    content = raw.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadSample(sample_id, f"message {number} has content {content!r}, not text")
    text = ""
    for part in content:
        name = part.get("type") if isinstance(part, dict) else None
        kind = PARTS.get(name) if isinstance(name, str) else None
        if name == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind and part.get(name) is not None:
            source = part[name]
            if isinstance(source, dict) and "url" in source:
                source = source["url"]
            media[kind].append(_media(source, kind, sample_id, folder))
            text += TAGS[kind]
        else:
            raise BadSample(sample_id, f"message {number} has a part of type {name!r}")
    return text


def _weight(raw: dict, number: int, sample_id: str) -> float | None:
    """`loss` (true or false) and `loss_scale` (a number) of a message, as one weight."""
    loss, scale = raw.get("loss"), raw.get("loss_scale")
    if loss is not None and not isinstance(loss, bool):
        raise BadSample(sample_id, f"message {number} has loss {loss!r}; use true or false")
    if scale is None:
        return None if loss is None else float(loss)
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not 0 <= scale <= MAX_LOSS_SCALE:
        raise BadSample(
            sample_id,
            f"message {number} has loss_scale {scale!s:.20}, not in 0..{MAX_LOSS_SCALE}",
        )
    return 0.0 if loss is False else float(scale)


def _media(source: object, kind: str, sample_id: str, folder: Path) -> Video:
    if kind == "video" and isinstance(source, list):
        return tuple(_media(frame, "image", sample_id, folder) for frame in source)
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            source = f"data:;base64,{source['bytes']}"
        else:
            source = source.get("path")
    article = "an" if kind == "image" else "a"
    if not isinstance(source, str) or not source:
        raise BadSample(
            sample_id, f"{article} {kind} is given as {source!r:.80}; use a path or a data URI"
        )
    if source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except ValueError as error:
            raise BadSample(sample_id, f"{article} {kind}'s base64 is damaged ({error})") from None
    if source.startswith(("http://", "https://")):
        raise BadSample(sample_id, f"{source}: {kind}s are not fetched; save them beside the data")
    return folder / source.removeprefix("file://")

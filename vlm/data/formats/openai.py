"""OpenAI's format of a message's `content`: a list of parts, media among them where they stand.

    {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
        {"type": "text", "text": "What is this?"}]}

So are `video_url`, and `image` and `video` with the source under the type's own name, `url` or
`path`. `{"type": "image"}` alone stands for the next of the row's `images`.
"""

from vlm.data.formats.context import RowContext
from vlm.data.formats.media_source import find_media
from vlm.data.schema import IMAGE_TAG, VIDEO_TAG, BadSample, Video

PARTS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
"""Types of content parts, and what each is."""
TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}


def parts_text(
    parts: list, place: str, sample_id: str, context: RowContext, media: dict[str, list[Video]]
) -> str:
    """The parts' text, with a tag for each image and video.

    Args:
        place: which message it is, for errors.
        media: `image` and `video` -> those of the sample so far; what the parts hold is added.
    """
    text = ""
    for part in parts:
        name = part.get("type") if isinstance(part, dict) else None
        kind = PARTS.get(name) if isinstance(name, str) else None
        if name == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind:
            given = (part[key] for key in (name, "url", "path") if part.get(key) is not None)
            source = next(given, None)
            if source is not None:
                media[kind].append(find_media(source, kind, sample_id, context))
            elif name != kind:
                raise BadSample(sample_id, f"{place} has a part of type {name!r} without a URL")
            text += TAGS[kind]
        else:
            raise BadSample(sample_id, f"{place} has a part of type {name!r:.80}")
    return text

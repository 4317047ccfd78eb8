"""ms-swift's format: one JSON object a line, `messages` with tags, `images` and `videos`.

    {"messages": [{"role": "user", "content": "<image>What is this?"},
                  {"role": "assistant", "content": "A cat.", "loss": true}],
     "images": ["cat.jpg"]}

Grounding (`objects`): `formats/grounding.py`; `tools` and their calls: `formats/tools.py`.
`content` may also be a list of parts: `formats/openai.py`. Images and videos are given in any way
that `formats/media_source.py` knows.
"""

from vlm.data.formats.context import RowContext
from vlm.data.formats.grounding import parse_objects
from vlm.data.formats.media_source import find_media
from vlm.data.formats.openai import PARTS, parts_text
from vlm.data.formats.tools import answer_text, call_text, parse_tools
from vlm.data.schema import BadSample, Message, Sample, Video, check_sample

MAX_LOSS_SCALE = 1000
"""Larger weights are surely a mistake."""


def parse_row(row: object, sample_id: str, context: RowContext) -> Sample:
    """A Sample from one decoded JSON object; BadSample says what is wrong with it."""
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise BadSample(sample_id, "no list of messages")
    if row.get("audios"):
        raise BadSample(sample_id, "audios are not supported")
    if row.get("rejected_response"):
        raise BadSample(sample_id, "has a rejected_response; preferences are not learnt")
    media: dict[str, list[Video]] = {"image": [], "video": []}
    messages = []
    for number, raw in enumerate(_with_system(row)):
        messages += _messages(raw, f"message {number}", sample_id, context, media)
    for kind, inline in media.items():
        listed = row.get(f"{kind}s") or []
        listed = [listed] if isinstance(listed, str) else listed
        if not isinstance(listed, list):
            raise BadSample(sample_id, f"{kind}s is not a list")
        if inline and listed:
            raise BadSample(sample_id, f"{kind}s both in content parts and in the {kind}s list")
        inline += [find_media(item, kind, sample_id, context) for item in listed]
    images, videos = tuple(media["image"]), tuple(media["video"])
    boxes = ()
    if row.get("objects"):
        messages, boxes = parse_objects(row["objects"], messages, len(images), sample_id)
    tools = parse_tools(row["tools"], sample_id) if row.get("tools") else ()
    return check_sample(Sample(sample_id, tuple(messages), images, videos, tools, boxes))


def _with_system(row: dict) -> list:
    """The messages; the row's `system` is the first of them unless they have their own."""
    messages, system = row["messages"], row.get("system")
    has_own = any(isinstance(raw, dict) and raw.get("role") == "system" for raw in messages)
    if system is None or has_own:
        return messages
    return [{"role": "system", "content": system}, *messages]


def _messages(
    raw: object,
    place: str,
    sample_id: str,
    context: RowContext,
    media: dict[str, list[Video]],
) -> list[Message]:
    """A message, and the calls of tools in it as messages of their own.

    Args:
        place: which message it is, for errors.
        media: the sample's so far; what content parts hold is added.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        raise BadSample(sample_id, f"{place} has no role")
    weight = _weight(raw, place, sample_id)
    role, content, calls = raw["role"], raw.get("content"), raw.get("tool_calls") or []
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise BadSample(sample_id, f"{place} has tool_calls; only an assistant may, in a list")
    if role == "tool_call":
        return [Message(role, call_text(content, place, sample_id), weight)]
    if role in ("tool", "tool_response"):
        role = "tool"
        if content is not None and not _is_parts(content):
            content = answer_text(content, sample_id)
    texts = [call_text(call, place, sample_id) for call in calls]
    called = [Message("tool_call", text, weight) for text in texts]
    if calls and not content:
        return called
    if isinstance(content, list):
        content = parts_text(content, place, sample_id, context, media)
    if not isinstance(content, str):
        raise BadSample(sample_id, f"{place} has content {content!r:.80}, not text")
    return [Message(role, content, weight), *called]


def _is_parts(content: object) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in ("text", *PARTS) for part in content
    )


def _weight(raw: dict, place: str, sample_id: str) -> float | None:
    """`loss` (true or false) and `loss_scale` (a number) of a message, as one weight."""
    loss, scale = raw.get("loss"), raw.get("loss_scale")
    if loss is not None and not isinstance(loss, bool):
        raise BadSample(sample_id, f"{place} has loss {loss!r}; use true or false")
    if scale is None:
        return None if loss is None else float(loss)
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not 0 <= scale <= MAX_LOSS_SCALE:
        raise BadSample(
            sample_id,
            f"{place} has loss_scale {scale!s:.20}, not in 0..{MAX_LOSS_SCALE}",
        )
    return 0.0 if loss is False else float(scale)

"""Sample: the one canonical form of training data, and the error that names a bad one.

Every accepted file format (`vlm/data/formats/`) is turned into Samples; nothing after it knows
where they came from.
"""

from dataclasses import dataclass
from pathlib import Path

IMAGE_TAG = "<image>"
VIDEO_TAG = "<video>"
ROLES = ("system", "user", "assistant")

Media = Path | bytes
"""An image: a file, or the encoded bytes themselves."""
Video = Media | tuple[Media, ...]
"""A video: a file, its encoded bytes, or its frames as images, already sampled."""


class BadSample(ValueError):
    """One sample that cannot be learnt from, and why; the run records it and goes on."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"{sample_id}: {reason}")
        self.sample_id, self.reason = sample_id, reason


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    """Text, with an `<image>` or `<video>` tag where each of them stands."""
    weight: float | None = None
    """Weight of this turn in the loss; None for the default (assistant 1, others 0)."""


@dataclass(frozen=True)
class Sample:
    """A conversation with its images and videos, each in the order of their tags."""

    id: str
    """`file:line`, for messages."""
    messages: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Video, ...] = ()


def check_sample(sample: Sample) -> Sample:
    """The sample itself, if it is well formed; else BadSample."""
    if not sample.messages:
        raise BadSample(sample.id, "messages is empty")
    for number, message in enumerate(sample.messages):
        if message.role not in ROLES:
            raise BadSample(
                sample.id, f"message {number} has role {message.role!r}; use {', '.join(ROLES)}"
            )
        if message.role == "system" and number > 0:
            raise BadSample(sample.id, f"message {number} is a system message; only the first may")
    for number, message in enumerate(sample.messages):
        try:
            message.content.encode("utf-8")
        except UnicodeEncodeError:
            raise BadSample(
                sample.id, f"message {number} has half of a surrogate pair, which is no text"
            ) from None
    for tag, media in ((IMAGE_TAG, sample.images), (VIDEO_TAG, sample.videos)):
        tags = sum(message.content.count(tag) for message in sample.messages)
        if tags != len(media):
            raise BadSample(
                sample.id, f"{tags} {tag} tags but {len(media)} {tag[1:-1]}s; give one each"
            )
    return sample

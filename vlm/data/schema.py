"""Sample: the one canonical form of training data, and the error that names a bad one.

Every accepted file format (`vlm/data/formats/`) is turned into Samples; nothing after it knows
where they came from.
"""

from dataclasses import dataclass
from pathlib import Path

IMAGE_TAG = "<image>"
ROLES = ("system", "user", "assistant")

Media = Path | bytes
"""An image: a file, or the encoded bytes themselves."""


class BadSample(ValueError):
    """One sample that cannot be learnt from, and why; the run records it and goes on."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"{sample_id}: {reason}")
        self.sample_id, self.reason = sample_id, reason


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    """Text, with an `<image>` tag where each image stands."""
    weight: float | None = None
    """Weight of this turn in the loss; None for the default (assistant 1, others 0)."""


@dataclass(frozen=True)
class Sample:
    """A conversation with its images, in the order of their tags."""

    id: str
    """`file:line`, for messages."""
    messages: tuple[Message, ...]
    images: tuple[Media, ...] = ()


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
    tags = sum(message.content.count(IMAGE_TAG) for message in sample.messages)
    if tags != len(sample.images):
        raise BadSample(
            sample.id, f"{tags} {IMAGE_TAG} tags but {len(sample.images)} images; give one each"
        )
    return sample

"""Sample: the one canonical form of training data, and the error that names a bad one.

Every accepted file format (`vlm/data/formats/`) is turned into Samples; nothing after it knows
where they came from.
"""

from dataclasses import dataclass
from pathlib import Path

IMAGE_TAG = "<image>"
VIDEO_TAG = "<video>"
BOX_TAG = "<bbox>"
ROLES = ("system", "user", "assistant", "tool_call", "tool")

Media = Path | bytes
"""An image: a file, or the encoded bytes themselves."""
Video = Media | tuple[Media, ...]
"""A video: a file, its encoded bytes, or its frames as images, already sampled."""


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold (half surrogates, as of odd names) as `\\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode()


class BadSample(ValueError):
    """One sample that cannot be learnt from, and why; the run records it and goes on."""

    def __init__(self, sample_id: str, reason: str) -> None:
        # both may quote a row's texts, and names of files that are no text
        sample_id, reason = printable(sample_id), printable(reason).replace("\n", "\\n")
        super().__init__(f"{sample_id}: {reason}")
        self.sample_id, self.reason = sample_id, reason

    def __reduce__(self) -> tuple:
        """Pickle would call it with the joined message; ranks and workers hand it on."""
        return type(self), (self.sample_id, self.reason)


@dataclass(frozen=True)
class Message:
    role: str
    """One of ROLES: the assistant's calls of tools are messages of their own, `tool_call`, as the
    text that the model writes; what a tool answers is `tool`."""
    content: str
    """Text, with an `<image>`, `<video>` or `<bbox>` tag where each of them stands."""
    weight: float | None = None
    """Weight of this turn in the loss; None for the default (assistant 1, others 0)."""


@dataclass(frozen=True)
class Box:
    """A box or a point in one of the images, which the text gives as the model sees the image."""

    numbers: tuple[float, ...]
    """(x, y) or (left, top, right, bottom), in pixels of the image as it is upright."""
    image: int = 0
    """Its number among the images."""
    is_share: bool = False
    """The numbers are shares of width and height, in 0..1."""


@dataclass(frozen=True)
class Sample:
    """A conversation with its images, videos and boxes, each in the order of their tags."""

    id: str
    """`file:line`, or `dataset:row` of a table."""
    messages: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Video, ...] = ()
    tools: tuple[str, ...] = ()
    """Tools that the assistant may call, each as the line of JSON that the model reads."""
    boxes: tuple[Box, ...] = ()
    """Empty where `<bbox>` is a text like any other."""


def check_sample(sample: Sample) -> Sample:
    """The sample itself, if it is well formed; else BadSample."""
    if not sample.messages:
        raise BadSample(sample.id, "messages is empty")
    for number, message in enumerate(sample.messages):
        if message.role not in ROLES:
            raise BadSample(
                sample.id, f"message {number} has role {message.role!r:.80}; use {', '.join(ROLES)}"
            )
        if message.role == "system" and number > 0:
            raise BadSample(sample.id, f"message {number} is a system message; only the first may")
    texts = [(f"message {n}", message.content) for n, message in enumerate(sample.messages)]
    for place, text in [*texts, *(("tools", tool) for tool in sample.tools)]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadSample(
                sample.id, f"{place} has half of a surrogate pair, which is no text"
            ) from None
    for tag in (IMAGE_TAG, VIDEO_TAG):
        if any(tag in tool for tool in sample.tools):
            raise BadSample(sample.id, f"tools have {tag} in their text, where no {tag[1:-1]} is")
    for tag, media in ((IMAGE_TAG, sample.images), (VIDEO_TAG, sample.videos)):
        tags = sum(message.content.count(tag) for message in sample.messages)
        if tags != len(media):
            raise BadSample(
                sample.id, f"{tags} {tag} tags but {len(media)} {tag[1:-1]}s; give one each"
            )
    return sample

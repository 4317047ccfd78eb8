"""What chat, batch and web page share: how to sample, an answer, the turns of a conversation.

A conversation is a `Sample` that ends with a user message. Whoever answers it is a `Backend`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from serve.usage import UsageError
from vlm.data.image import BadImage, header_size
from vlm.data.limits import Limits
from vlm.data.schema import IMAGE_TAG, VIDEO_TAG, BadSample, Media, Message, Sample, Video
from vlm.data.video import BadVideo, video_info

THINK, THINK_END = "<think>", "</think>"
NO_THOUGHT = f"{THINK}\n\n{THINK_END}\n\n"
"""How an answer begins when thinking is off (Qwen3's convention)."""


class EndpointError(Exception):
    """A request that failed; another may succeed."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; greedy by default."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    thinking: bool | None = None
    """None leaves it to the model."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Answer:
    text: str
    finish: str
    """`stop` at the end of the turn, `length` at max_new_tokens."""


class Backend(Protocol):
    """A local checkpoint (`serve/local.py`) or an endpoint (`serve/endpoint.py`)."""

    def identity(self) -> dict:
        """Which model answers, and by what limits, as JSON."""

    def ask(
        self, conversation: Sample, sampling: Sampling, show: Callable[[str], object]
    ) -> Answer:
        """One answer; `show` gets its text piece by piece. BadSample if it cannot be given."""

    def ask_many(
        self, conversations: Iterable[Sample], sampling: Sampling, batch_size: int
    ) -> Iterator[tuple[str, Answer | BadSample]]:
        """(id, answer or why there is none) of each conversation, in any order."""


def question(text: str, images: int, videos: int) -> Message:
    """A user message with tags in front for all images and videos that `text` does not place."""
    tags = IMAGE_TAG * (images - text.count(IMAGE_TAG))
    return Message("user", tags + VIDEO_TAG * (videos - text.count(VIDEO_TAG)) + text)


def reply(text: str) -> Message:
    """An answer as a turn. A tag that the model wrote is broken up: no image belongs to it."""
    for tag in (IMAGE_TAG, VIDEO_TAG):
        text = text.replace(tag, f"{tag[:-1]} >")
    return Message("assistant", text)


def without_thoughts(conversation: Sample) -> Sample:
    """Earlier answers as the model sees them: what was thought is dropped (Qwen3's template)."""
    turns = (
        replace(turn, content=_spoken(turn.content)) if turn.role == "assistant" else turn
        for turn in conversation.messages
    )
    return replace(conversation, messages=tuple(turns))


def _spoken(answer: str) -> str:
    if THINK_END in answer:
        return answer.rpartition(THINK_END)[2].lstrip("\n")
    return answer.partition(THINK)[0]  # cut off while thinking


def check_image(image: Media) -> None:
    """Open the header; BadSample names the file and the reason."""
    try:
        header_size(image)
    except BadImage as error:
        raise BadSample("chat", str(error)) from None


def check_video(video: Video) -> None:
    """The same for a video."""
    try:
        video_info(video, Limits.fps)
    except (BadVideo, BadImage) as error:
        raise BadSample("chat", str(error)) from None

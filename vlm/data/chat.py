"""A conversation as spans of text, each with its weight in the loss.

ChatML as Qwen's template renders it. Which spans are learnt follows from the structure of the
conversation: the assistant's words and the end of its turn. No token id is searched for, so
that special tokens inside a text change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.data.schema import BadSample, Message, Sample

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Span:
    """Text that is tokenised as a piece."""

    text: str
    weight: float = 0.0


def render(sample: Sample, default_system: str = DEFAULT_SYSTEM) -> list[Span]:
    """The conversation's spans; it must end with the assistant."""
    spans = _open(sample.messages, default_system)
    turns = join_turns(sample)
    if turns[-1].role != "assistant":
        raise BadSample(sample.id, "ends with a user message, so its answer cannot be learnt")
    for turn in turns:
        if turn.role == "user":
            spans.append(Span(_question(turn.content)))
        else:
            weight = _weight(turn)
            # a scale is of the words; the end of a learnt turn always counts in full
            spans += [Span(turn.content, weight), Span("<|im_end|>\n", float(weight != 0))]
    return spans


def render_prompt(
    sample: Sample, default_system: str = DEFAULT_SYSTEM, answer_prefix: str = ""
) -> list[Span]:
    """The conversation up to where the assistant's next words begin, after `answer_prefix`."""
    turns = join_turns(sample)
    if turns[-1].role != "user":
        raise BadSample(sample.id, "ends with the assistant; a prompt ends with a user message")
    spans = _open(sample.messages, default_system)
    for turn in turns:
        text = _question(turn.content) if turn.role == "user" else f"{turn.content}<|im_end|>\n"
        spans.append(Span(text))
    return [*spans, Span(answer_prefix)]


def _open(messages: Sequence[Message], default_system: str) -> list[Span]:
    system = messages[0].content if messages[0].role == "system" else default_system
    return [Span(f"<|im_start|>system\n{system}<|im_end|>\n")] if system else []


def _weight(answer: Message) -> float:
    return 1.0 if answer.weight is None else answer.weight


def _question(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def join_turns(sample: Sample) -> list[Message]:
    """User and assistant in turn: neighbours of one role are joined, as the peer does."""
    turns: list[Message] = []
    for message in sample.messages:
        if message.role == "system":
            continue
        if turns and turns[-1].role == message.role:
            if message.role == "assistant" and _weight(turns[-1]) != _weight(message):
                raise BadSample(sample.id, "joins assistant messages of different loss weights")
            joined = turns[-1].content + message.content
            turns[-1] = Message(message.role, joined, message.weight)
        else:
            turns.append(message)
    if not turns:
        raise BadSample(sample.id, "has a system message and nothing else")
    if turns[0].role == "assistant":
        turns.insert(0, Message("user", ""))
    return turns

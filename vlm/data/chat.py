"""A conversation as spans of text, each with its weight in the loss.

ChatML as Qwen's template renders it, with tools as Qwen2.5's does (Hermes style). Which spans are
learnt follows from the structure of the conversation: the assistant's words and the end of its
turn. No token id is searched for, so that special tokens inside a text change nothing.
"""

from dataclasses import dataclass, replace
from typing import Literal

from vlm.data.schema import IMAGE_TAG, VIDEO_TAG, BadSample, Message, Sample

DEFAULT_SYSTEM = "You are a helpful assistant."
Think = Literal["keep", "strip_history"]
"""What becomes of the assistant's thoughts (`<think>...</think>`): they stay as they stand, or go
from the answers before the last question, as Qwen3's template has it."""

THINK_END = "</think>"
START, END = "<|im_start|>", "<|im_end|>\n"
ANSWER = f"{START}assistant\n"
TOOLS_BEFORE = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TOOLS_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
SPEAKERS = {"user": "user", "assistant": "assistant", "tool_call": "assistant", "tool": "tool"}
"""Who speaks in a message of each role; neighbours of one speaker are one turn."""


@dataclass(frozen=True)
class Span:
    """Text that is tokenised as a piece."""

    text: str
    weight: float = 0.0


def render(
    sample: Sample, default_system: str = DEFAULT_SYSTEM, think: Think = "keep"
) -> list[Span]:
    """The conversation's spans; it must end with the assistant."""
    turns = join_turns(sample, think)
    if turns[-1].role != "assistant":
        raise BadSample(sample.id, "ends with a user message, so its answer cannot be learnt")
    return [*_system(sample, default_system), *_spans(turns)]


def render_prompt(
    sample: Sample,
    default_system: str = DEFAULT_SYSTEM,
    answer_prefix: str = "",
    think: Think = "keep",
) -> list[Span]:
    """The conversation up to where the assistant's next words begin, after `answer_prefix`."""
    turns = join_turns(sample, think)
    if turns[-1].role == "assistant":
        raise BadSample(sample.id, "ends with the assistant; a prompt ends with a user message")
    spans = [*_system(sample, default_system), *_spans(turns), Span(ANSWER), Span(answer_prefix)]
    return [Span(span.text) for span in spans]


def system_text(sample: Sample, default_system: str = DEFAULT_SYSTEM) -> str:
    """The system prompt with the tools that the assistant may call; empty for none."""
    first = sample.messages[0]
    text = first.content if first.role == "system" else default_system
    if not sample.tools:
        return text
    lines = "\n".join(sample.tools)
    return f"{text}{TOOLS_BEFORE}{lines}{TOOLS_AFTER}"


def join_turns(sample: Sample, think: Think = "keep") -> list[Message]:
    """Turns of `user` and `assistant`, as they stand in the text, without the system prompt.

    Neighbours of one speaker are joined, as ms-swift does. What tools answer is a user's turn.

    Raises:
        BadSample: no turns, tools that answer nobody, or a join of different loss weights.
    """
    turns: list[Message] = []
    before = ""
    for message in sample.messages:
        if message.role == "system":
            continue
        turn = replace(message, role=SPEAKERS[message.role])
        if turn.role == "tool":
            turn = replace(turn, content=f"<tool_response>\n{turn.content}\n</tool_response>")
        if turns and turns[-1].role == turn.role:
            if turn.role == "assistant" and _weight(turns[-1]) != _weight(turn):
                raise BadSample(sample.id, "joins assistant messages of different loss weights")
            # several calls, or several answers of tools, stand on lines of their own
            lines = message.role == before and before in ("tool_call", "tool")
            joined = turns[-1].content + "\n" * lines + turn.content
            turns[-1] = replace(turn, content=joined)
        elif turn.role == "tool" and (not turns or turns[-1].role != "assistant"):
            raise BadSample(sample.id, "has a tool's answer that follows no assistant message")
        else:
            turns.append(turn)
        before = message.role
    if not turns:
        raise BadSample(sample.id, "has a system message and nothing else")
    if turns[0].role == "assistant":
        turns.insert(0, Message("user", ""))
    if think == "strip_history":
        turns = _without_old_thoughts(turns, sample.id)
    return [replace(turn, role="user") if turn.role == "tool" else turn for turn in turns]


def _without_old_thoughts(turns: list[Message], sample_id: str) -> list[Message]:
    """Answers before the last question of a user, without what was thought."""
    last = max(number for number, turn in enumerate(turns) if turn.role == "user")
    kept = []
    for turn in turns[:last]:
        thought, end, spoken = turn.content.rpartition(THINK_END)
        if turn.role == "assistant" and end:
            if IMAGE_TAG in thought or VIDEO_TAG in thought:
                raise BadSample(sample_id, "has an image or video in a thought that is dropped")
            turn = replace(turn, content=spoken.lstrip("\n"))
        kept.append(turn)
    return kept + turns[last:]


def _system(sample: Sample, default_system: str) -> list[Span]:
    text = system_text(sample, default_system)
    return [Span(f"{START}system\n{text}{END}")] if text else []


def _spans(turns: list[Message]) -> list[Span]:
    spans = []
    for turn in turns:
        if turn.role == "user":
            spans.append(Span(f"{START}user\n{turn.content}{END}"))
        else:
            weight = _weight(turn)
            # a scale is of the words; the end of a learnt turn always counts in full
            spans += [Span(ANSWER), Span(turn.content, weight), Span(END, float(weight != 0))]
    return spans


def _weight(answer: Message) -> float:
    return 1.0 if answer.weight is None else answer.weight

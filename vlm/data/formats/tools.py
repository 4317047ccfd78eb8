"""Tools of a row, calls of them and their answers, as the text that the model reads and writes.

Tools are a list of function descriptions, or JSON of one. Calls are messages of the role
`tool_call` (ms-swift) or `tool_calls` of an assistant message (OpenAI); answers are of the role
`tool` or `tool_response`. All in Hermes style, as ms-swift renders them for Qwen2.5-VL.
"""

import ast
import json

from vlm.data.schema import BadSample

UNREADABLE = object()


def parse_tools(tools: object, sample_id: str) -> tuple[str, ...]:
    """The lines of JSON that describe the tools; a bare function is wrapped."""
    listed = _decoded(tools)
    lines = []
    for number, given in enumerate(listed if isinstance(listed, list) else [tools]):
        tool = _decoded(given)
        if not isinstance(tool, dict):
            raise BadSample(sample_id, f"tool {number} is {given!r:.80}; use an object")
        is_wrapped = "type" in tool or "function" in tool
        lines.append(
            _json(tool if is_wrapped else {"type": "function", "function": tool}, sample_id)
        )
    return tuple(lines)


def call_text(call: object, place: str, sample_id: str) -> str:
    """One call as the assistant writes it.

    Args:
        call: `name` and `arguments` (or `parameters`; {} without), both maybe as JSON, and maybe
            inside `function`.
        place: where it stands, for the error.
    """
    call = _decoded(call)
    if isinstance(call, dict):
        call = _decoded(call.get("function", call))
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise BadSample(sample_id, f"{place} has a tool call without a name")
    arguments = call.get("arguments")
    given = call.get("parameters") if arguments is None else arguments
    arguments = {} if given is None else _decoded(given)
    if arguments is None or arguments is UNREADABLE:
        raise BadSample(
            sample_id, f"{place} calls {call['name']:.80} with arguments {given!r:.80}, not JSON"
        )
    line = _json({"name": call["name"], "arguments": arguments}, sample_id)
    return f"<tool_call>\n{line}\n</tool_call>"


def answer_text(answer: object, sample_id: str) -> str:
    """What a tool answered: text as it is, anything else as JSON."""
    return answer if isinstance(answer, str) else _json(answer, sample_id)


def _decoded(value: object) -> object:
    """What a text holds as JSON or as a Python literal, which ms-swift takes too."""
    if not isinstance(value, str):
        return value
    for decode in (json.loads, ast.literal_eval):
        try:
            return decode(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return UNREADABLE


def _json(value: object, sample_id: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadSample(sample_id, f"has tools or calls that are not JSON ({error})") from None

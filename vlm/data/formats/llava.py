"""LLaVA's format (and ShareGPT's): `conversations` of `from` and `value`, with an `image`.

    {"id": "1", "image": "cat.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"},
        {"from": "gpt", "value": "A cat."}]}

`<image>` stays where it stands, with the line feeds around it as they are.
"""

from vlm.data.schema import BadSample

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "tool_call",
    "observation": "tool",
}
"""Names of speakers that differ from ours; others are taken as they are."""


def from_llava(row: dict, sample_id: str) -> dict:
    """The row in ms-swift's format."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise BadSample(sample_id, f"conversations is {turns!r:.80}, not a list")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadSample(sample_id, f"conversations has {turn!r:.80} at {number}, no object")
        speaker = turn.get("from", turn.get("role"))
        role = ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        content = turn.get("value", turn.get("content"))
        messages.append({**turn, "role": role, "content": content})
    return {**row, "messages": messages}

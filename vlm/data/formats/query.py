"""Question and answer in columns: `query` and `response`, or Alpaca's `instruction` and `output`.

{"query": "<image>What is this?", "response": "A cat.", "images": ["cat.jpg"],
 "system": "Be brief.", "history": [["Hello", "Good day."]]}
{"instruction": "Translate.", "input": "chat", "output": "cat"}
"""

from vlm.data.schema import BadSample


def from_query(row: dict, sample_id: str) -> dict:
    """The row in ms-swift's format."""
    history = row.get("history") or []
    pairs = [*history, [row["query"], row.get("response")]] if isinstance(history, list) else []
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadSample(sample_id, f"history is {history!r:.80}, not pairs of question and answer")
    return _with_messages(row, pairs)


def from_alpaca(row: dict, sample_id: str) -> dict:
    """The row in ms-swift's format; `input` stands on a line of its own."""
    question, more = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(more, str) and more:
        question = f"{question}\n{more}" if question else more
    return _with_messages(row, [[question, row.get("output")]])


def _with_messages(row: dict, pairs: list[list]) -> dict:
    messages = [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    return {**row, "messages": messages}

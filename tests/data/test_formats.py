"""Every format gives the sample that ms-swift's gives, and a bad row of any is named."""

import copy
import json
import random
from pathlib import Path

import pytest

from tests.data.samples import assistant, user
from vlm.data.formats import parse_line, parse_row
from vlm.data.formats.context import RowContext
from vlm.data.formats.table import plain_row
from vlm.data.schema import BadSample, Sample

HERE = RowContext(Path("/data"))
SWIFT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        user("<image>\nWhat is this?"),
        assistant("A cat."),
        user("Sure?"),
        assistant("Yes."),
    ],
    "images": ["cat.jpg"],
}
SAME = {
    "LLaVA": {
        "id": "0001",
        "image": "cat.jpg",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    "LLaVA, lists": {
        "image": ["cat.jpg"],
        "system": "Be brief.",
        "conversations": [
            {"from": "user", "value": "<image>\nWhat is this?"},
            {"from": "assistant", "value": "A cat."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
    },
    "query": {
        "query": "Sure?",
        "response": "Yes.",
        "history": [["<image>\nWhat is this?", "A cat."]],
        "system": "Be brief.",
        "images": ["cat.jpg"],
    },
    "OpenAI": {
        "messages": [
            SWIFT["messages"][0],
            user(
                [
                    {"type": "image_url", "image_url": {"url": "cat.jpg", "detail": "low"}},
                    {"type": "text", "text": "\nWhat is this?"},
                ]
            ),
            *SWIFT["messages"][2:],
        ]
    },
    "parts with the images beside them": {
        "messages": [
            SWIFT["messages"][0],
            user([{"type": "image"}, {"type": "text", "text": "\nWhat is this?"}]),
            *SWIFT["messages"][2:],
        ],
        "images": ["cat.jpg"],
    },
    "one image": {"messages": SWIFT["messages"], "image": "cat.jpg"},
}
TALK = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
BAD = [
    ([1], "but a list"),
    (None, "but a NoneType"),
    ({"text": "a", "label": 1}, "nor conversations, query, instruction.*its keys: label, text"),
    ({"conversations": None}, "no list of messages"),
    ({"conversations": "hi"}, "conversations is 'hi', not a list"),
    ({"conversations": ["hi"]}, "conversations has 'hi' at 0"),
    ({"conversations": [{"value": "a"}]}, "message 0 has no role"),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "role 'alien'"),
    ({"conversations": [{"from": "human", "value": None}]}, "content None"),
    ({"conversations": [{"from": "human"}]}, "content None"),
    ({"conversations": TALK, "image": "a.png"}, "0 <image> tags but 1 images"),
    ({"conversations": TALK, "image": 5}, "an image is given as 5"),
    ({"conversations": TALK, "image": "a.png", "images": ["b.png"]}, "both image and images"),
    ({"query": 5, "response": "a"}, "content 5"),
    ({"query": "a"}, "content None"),
    ({"query": "a", "response": "b", "history": "c"}, "history is 'c'"),
    ({"query": "a", "response": "b", "history": [["c"]]}, "history is"),
    ({"query": "a", "response": "b", "history": {"a": 1}}, "history is"),
    ({"instruction": "a", "output": float("nan")}, "content nan"),
    ({"messages": [user([{"type": "image_url"}])]}, "image_url.*without a URL"),
    ({"messages": [user([{"type": "image", "image": []}])]}, r"an image is given as \[\]"),
    ({"messages": [user([{"type": ["image"]}])]}, r"part of type \['image'\]"),
    ({"messages": [user([{"type": "image"}])]}, "1 <image> tags but 0 images"),
]


@pytest.mark.parametrize("name", SAME)
def test_all_formats_of_one_conversation_give_one_sample(name):
    expected = parse_row(SWIFT, "x", HERE)
    assert parse_row(SAME[name], "x", HERE) == expected
    assert parse_line(json.dumps(SAME[name]), "x", HERE) == expected
    assert expected.images == (Path("/data/cat.jpg"),)
    assert [message.role for message in expected.messages[:2]] == ["system", "user"]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_of_any_format_is_told_in_one_line(row, reason):
    with pytest.raises(BadSample, match=reason) as error:
        parse_row(row, "data.jsonl:7", HERE)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("data.jsonl:7: ")


def test_alpaca_puts_the_input_on_a_line_of_its_own():
    def question(**row):
        return parse_row({"output": "b", **row}, "x", HERE).messages[0].content

    assert question(instruction="Translate.", input="chat") == "Translate.\nchat"
    assert question(instruction="Translate.", input="") == "Translate."
    assert question(instruction="Translate.") == "Translate."
    assert question(instruction="", input="chat") == "chat"


def test_weights_and_tools_work_in_every_format():
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny.", "loss": False},
    ]
    sample = parse_row({"conversations": turns, "tools": '[{"name": "look"}]'}, "x", HERE)
    assert [message.role for message in sample.messages] == [
        "user",
        "tool_call",
        "tool",
        "assistant",
    ]
    assert sample.messages[3].weight == 0
    assert len(sample.tools) == 1


def test_videos_are_one_or_several_or_frames():
    row = {"query": "<video>", "response": "a"}
    one = parse_row({**row, "video": "a.mp4"}, "x", HERE)
    assert one.videos == (Path("/data/a.mp4"),)
    frames = parse_row({**row, "videos": [["0.png", "1.png"]]}, "x", HERE)
    assert frames.videos == ((Path("/data/0.png"), Path("/data/1.png")),)


def test_a_row_of_a_table_is_as_a_line_would_have_it():
    nulls = {
        "messages": [{"role": "user", "content": "a", "loss": None}, None],
        "images": None,
        "objects": {"ref": None, "bbox": [[1, 2]]},
    }
    assert plain_row(nulls) == {
        "messages": [{"role": "user", "content": "a"}, None],
        "objects": {"bbox": [[1, 2]]},
    }
    assert plain_row({"messages": json.dumps(SWIFT["messages"])}) == {"messages": SWIFT["messages"]}
    columns = {"from": ["human", "gpt"], "value": ["a", "b"]}
    assert plain_row({"conversations": columns}) == {"conversations": TALK}
    for text in ("hello", "[broken", "[" * 100_000):
        assert plain_row({"messages": text}) == {"messages": text}
    assert plain_row({"query": "[1]"}) == {"query": "[1]"}
    uneven = {"conversations": {"from": ["human"], "value": []}}
    assert plain_row(uneven) == uneven


ODD = [None, 5, -1, 0.5, float("nan"), "", "a", "[1]", "{", "<image>", "<bbox>", "\ud800", "\0", []]
ODD += [{}, [[]], [None], {"a": 1}, True, b"x", b"", 10**400, "data:", "http://x", "file://", "://"]
ODD += [{"bytes": b"a"}, {"url": None}, {"path": {}}, ["a", ["b"]], "a\nb" * 500]


def places(value, path=()):
    """Every place in a row, as the keys that lead there."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if is_list(value) else ():
        yield from places(value[key], (*path, key))


def is_list(value):
    return isinstance(value, list)


def spoil(row, rng):
    """Something odd in one place of a row."""
    *path, last = rng.choice([path for path in places(row) if path])
    inner = row
    for key in path:
        inner = inner[key]
    inner[last] = copy.deepcopy(rng.choice(ODD))


@pytest.mark.parametrize("name", [*SAME, "ms-swift"])
def test_odd_values_anywhere_never_do_more_than_spoil_the_row(name):
    rng = random.Random(name)
    for _ in range(300):
        row = copy.deepcopy(SAME.get(name, SWIFT))
        for _ in range(rng.randint(1, 2)):
            spoil(row, rng)
        for context in (HERE, RowContext(None, Path("/data"))):
            for shape in (row, plain_row(row)):
                try:
                    assert isinstance(parse_row(shape, "data.jsonl:1", context), Sample)
                except BadSample as error:
                    assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("name", [*SAME, "ms-swift"])
def test_damaged_bytes_never_do_more_than_spoil_the_line(name):
    rng = random.Random(name)
    for _ in range(300):
        line = bytearray(json.dumps(SAME.get(name, SWIFT)).encode())
        for _ in range(rng.randint(1, 4)):
            line[rng.randrange(len(line))] = rng.randrange(256)
        try:
            parse_line(bytes(line), "data.jsonl:1", HERE)
        except BadSample as error:
            assert "\n" not in str(error)


def test_a_system_prompt_beside_the_messages_is_taken_unless_they_have_one():
    talk = [user("a"), assistant("b")]
    (first, *_) = parse_row({"messages": talk, "system": "Be brief."}, "x", HERE).messages
    assert (first.role, first.content) == ("system", "Be brief.")
    own = [{"role": "system", "content": "own"}, *talk]
    sample = parse_row({"messages": own, "system": "Be brief."}, "x", HERE)
    assert [message.content for message in sample.messages] == ["own", "a", "b"]


def test_a_rejected_response_is_refused_by_name():
    with pytest.raises(BadSample, match="x: has a rejected_response"):
        parse_row({"messages": [user("a"), assistant("b")], "rejected_response": "c"}, "x", HERE)


def test_one_path_is_a_list_of_one_and_base64_may_have_lines():
    talk = [user("<image>a"), assistant("b")]
    assert parse_row({"messages": talk, "images": "a.png"}, "x", HERE).images == (
        Path("/data/a.png"),
    )
    uri = "data:image/png;base64,YW\r\nJj\n"
    assert parse_row({"messages": talk, "images": [uri]}, "x", HERE).images == (b"abc",)


def test_a_bad_samples_name_and_reason_can_be_printed():
    error = BadSample("\udcff.jsonl:1", "\ud800 does\nnot exist")
    assert str(error) == r"\udcff.jsonl:1: \ud800 does\nnot exist"
    assert error.sample_id.encode() and error.reason.encode()

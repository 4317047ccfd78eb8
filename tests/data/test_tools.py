"""Tools, their calls and their answers, in every shape that data files give them."""

import json

import pytest

from tests.data.samples import GOLDEN, assistant, processor, sample, user
from vlm.data.chat import TOOLS_AFTER, TOOLS_BEFORE, join_turns, render, render_prompt, system_text
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.schema import BadSample

FUNCTION = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
LINE = '{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", '
LINE += '"properties": {}}}}'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
ARGUMENTS = {"city": "Zürich"}
ANSWER = {"role": "tool", "content": "20"}


def call(content, **keys):
    return {"role": "tool_call", "content": content, **keys}


def row(*messages, **keys):
    return {"messages": list(messages), **keys}


def parsed(*messages, **keys):
    return parse_row(row(*messages, **keys), "data.jsonl:1", RowContext(GOLDEN))


def turns(*messages, **keys):
    return [(turn.role, turn.content) for turn in join_turns(parsed(*messages, **keys))]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [FUNCTION],
        [json.dumps(TOOL)],
        json.dumps([TOOL]),
        json.dumps(FUNCTION),
        str([TOOL]),  # a Python literal, as data sets have it
    ],
)
def test_tools_in_every_shape_are_the_same_lines(tools):
    assert parsed(user("a"), assistant("b"), tools=tools).tools == (LINE,)


def test_tools_of_other_types_stay_as_they_are():
    given = [{"type": "web_search"}, {"function": {"name": "f"}}]
    assert parsed(user("a"), assistant("b"), tools=given).tools == tuple(map(json.dumps, given))


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_leave_the_system_prompt_alone(tools):
    assert system_text(parsed(user("a"), assistant("b"), tools=tools)) == (
        "You are a helpful assistant."
    )


@pytest.mark.parametrize(
    ("system", "text"),
    [(None, "You are a helpful assistant."), ("Be brief.", "Be brief."), ("", "")],
)
def test_tools_follow_the_system_prompt(system, text):
    """Also an empty one, whose block is written then."""
    first = [] if system is None else [{"role": "system", "content": system}]
    ours = parsed(*first, user("a"), assistant("b"), tools=[TOOL, {"name": "查"}])
    second = '{"type": "function", "function": {"name": "查"}}'
    expected = f"{text}{TOOLS_BEFORE}{LINE}\n{second}{TOOLS_AFTER}"
    assert render(ours)[0].text == f"<|im_start|>system\n{expected}<|im_end|>\n"


@pytest.mark.parametrize(
    "content",
    [
        {"name": "get_weather", "arguments": ARGUMENTS},
        json.dumps({"name": "get_weather", "arguments": ARGUMENTS}),
        {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)},
        {"name": "get_weather", "parameters": ARGUMENTS, "id": "call_1"},
        {"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}},
        str({"arguments": ARGUMENTS, "name": "get_weather"}),
    ],
)
def test_a_call_in_every_shape_is_the_same_text(content):
    assert turns(user("a"), call(content)) == [("user", "a"), ("assistant", CALL)]
    if isinstance(content, dict):
        said = assistant(None, tool_calls=[content])
        assert turns(user("a"), said) == [("user", "a"), ("assistant", CALL)]


def test_words_and_calls_of_the_assistant_are_one_turn():
    content = {"name": "get_weather", "arguments": ARGUMENTS}
    joined = [("user", "a"), ("assistant", f"I look.{CALL}\n{CALL}")]
    assert turns(user("a"), assistant("I look."), call(content), call(content)) == joined
    assert turns(user("a"), assistant("I look.", tool_calls=[content, content])) == joined
    parts = [{"type": "text", "text": "I look."}]
    assert turns(user("a"), assistant(parts, tool_calls=[content, content])) == joined
    assert turns(user("a"), assistant("I look."), assistant("", tool_calls=[content] * 2)) == joined
    again = assistant("", tool_calls=[content])  # empty words do not come between two calls
    assert turns(user("a"), assistant("I look."), call(content), again) == joined


def test_answers_of_tools_are_one_turn_of_the_user():
    content = {"name": "get_weather", "arguments": ARGUMENTS}
    start = [user("a"), call(content), call(content)]
    answers = [{"role": "tool", "content": "20"}, {"role": "tool_response", "content": {"t": "é"}}]
    said = turns(*start, *answers, assistant("b"))
    text = '<tool_response>\n20\n</tool_response>\n<tool_response>\n{"t": "é"}\n</tool_response>'
    assert said[2:] == [("user", text), ("assistant", "b")]
    numbers = turns(*start, {"role": "tool", "content": [1, 2]}, assistant("b"))
    assert numbers[2] == ("user", "<tool_response>\n[1, 2]\n</tool_response>")


def test_a_question_after_an_answer_of_a_tool_is_a_turn_of_its_own():
    content = {"name": "f", "arguments": {}}
    said = turns(user("a"), call(content), ANSWER, user("b"), user("c"), assistant("d"))
    assert said[2:] == [
        ("user", "<tool_response>\n20\n</tool_response>"),
        ("user", "bc"),
        ("assistant", "d"),
    ]


def test_calls_are_learnt_and_answers_are_not():
    content = {"name": "f", "arguments": {}}
    example = processor().encode(parsed(user("a"), call(content), ANSWER, assistant("b")))
    learnt = example.targets[example.targets != -100].tolist()
    text = processor().tokenizer.decode(learnt, skip_special_tokens=False)
    call_text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert text == f"{call_text}<|im_end|>\nb<|im_end|>\n"


def test_loss_of_a_call():
    """The peer forgets it."""
    content = {"name": "f", "arguments": {}}
    given = [user("a"), call(content, loss=False), ANSWER, assistant("b")]
    learnt = [span.text for span in render(parsed(*given)) if span.weight]
    assert learnt == ["b", "<|im_end|>\n"]
    scaled = assistant("", tool_calls=[content], loss_scale=0.5)
    assert [s.weight for s in render(parsed(user("a"), scaled))] == [0, 0, 0, 0.5, 1]
    with pytest.raises(BadSample, match="different loss weights"):
        render(parsed(user("a"), assistant("look"), call(content, loss=False)))


@pytest.mark.parametrize(
    "content", ["<image>!", [{"type": "image", "image": "images/sq28.png"}, {"type": "text"}]]
)
def test_an_image_in_an_answer_of_a_tool(content):
    if isinstance(content, list):
        content[1]["text"] = "!"
    images = [] if isinstance(content, list) else ["images/sq28.png"]
    look = call({"name": "look", "arguments": {}})
    ours = parsed(user("a"), look, ANSWER | {"content": content}, assistant("b"), images=images)
    assert join_turns(ours)[2].content == "<tool_response>\n<image>!\n</tool_response>"
    assert len(processor().encode(ours).grid_thw) == 1


def test_a_prompt_may_end_with_an_answer_of_a_tool():
    content = {"name": "f", "arguments": {}}
    ours = parsed(user("a"), call(content), ANSWER, tools=[TOOL])
    text = "".join(span.text for span in render_prompt(ours))
    assert text.endswith("20\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert LINE in text
    with pytest.raises(BadSample, match="ends with a user message"):
        render(ours)


@pytest.mark.parametrize(
    ("messages", "keys", "reason"),
    [
        ([user("a"), ANSWER, assistant("b")], {}, "follows no assistant message"),
        ([ANSWER, assistant("b")], {}, "follows no assistant message"),
        ([user("a"), call("get_weather()")], {}, "message 1 has a tool call without a name"),
        ([user("a"), call({"arguments": {}})], {}, "a tool call without a name"),
        ([user("a"), call([{"name": "f"}])], {}, "a tool call without a name"),
        ([user("a"), call(None)], {}, "a tool call without a name"),
        ([user("a"), call({"name": "f", "arguments": "{"})], {}, "arguments '{', not JSON"),
        ([user("a") | {"tool_calls": [{}]}, assistant("b")], {}, "only an assistant"),
        ([user("a"), assistant("b", tool_calls={"name": "f"})], {}, "tool_calls"),
        ([user("a"), assistant(None, tool_calls=[])], {}, "content None, not text"),
        ([user("a"), call({"name": "f", "arguments": "{1}"})], {}, "not JSON"),
        ([user("a"), call({"name": "f", "arguments": "0x" + "f" * 9999})], {}, "not JSON"),
        ([user("a"), assistant("b")], {"tools": "get_weather"}, "tool 0 is 'get_weather'"),
        ([user("a"), assistant("b")], {"tools": 3}, "tool 0 is 3"),
        ([user("a"), assistant("b")], {"tools": [TOOL, "x"]}, "tool 1 is 'x'"),
        ([user("a"), assistant("b")], {"tools": [{"name": "<image>"}]}, "tools have <image>"),
        ([user("a"), assistant("b")], {"tools": [{"name": "\ud800"}]}, "tools has half of a"),
        ([user("a"), assistant("b")], {"tools": "[" * 100_000}, "tool 0 is"),
    ],
)
def test_what_cannot_be_read_is_refused(messages, keys, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        render(parsed(*messages, **keys))
    assert "\n" not in str(caught.value)


THOUGHT = "<think>\nhm\n</think>\n\n"


def spoken(think, *messages):
    return [turn.content for turn in join_turns(sample(*messages), think)]


def test_thoughts_of_earlier_answers_stay_or_go():
    messages = user("a"), assistant(f"{THOUGHT}b"), user("c"), assistant(f"{THOUGHT}d")
    assert spoken("keep", *messages) == ["a", f"{THOUGHT}b", "c", f"{THOUGHT}d"]
    assert spoken("strip_history", *messages) == ["a", "b", "c", f"{THOUGHT}d"]
    assert spoken("strip_history", *messages[:3]) == ["a", "b", "c"]


def test_thoughts_between_calls_for_one_question_stay():
    """They belong to the answer that is under way, as in Qwen3's template."""
    look = assistant(THOUGHT), call({"name": "f", "arguments": {}}), ANSWER
    said = spoken("strip_history", user("a"), *look, assistant("b"), user("c"), *look, user("d"))
    assert not any(THOUGHT in text for text in said)
    said = spoken("strip_history", user("a"), *look, assistant(f"{THOUGHT}b"))
    assert [THOUGHT in text for text in said] == [False, True, False, True]


def test_an_image_in_a_thought_that_goes_is_refused():
    messages = user("a"), assistant("<think><image></think>b"), user("c"), assistant("d")
    ours = sample(*messages, images=["images/sq28.png"])
    assert len(processor().encode(ours).grid_thw) == 1
    with pytest.raises(BadSample, match="in a thought that is dropped"):
        processor(think="strip_history").encode(ours)


def test_the_processor_strips_in_training_measuring_and_prompts():
    messages = user("a"), assistant(f"{THOUGHT}b"), user("c"), assistant(f"{THOUGHT}d")
    ours, bare = processor(think="strip_history"), processor()
    shorter = sample(user("a"), assistant("b"), user("c"), assistant(f"{THOUGHT}d"))
    assert ours.encode(sample(*messages)).input_ids.equal(bare.encode(shorter).input_ids)
    assert ours.measure(sample(*messages)) == bare.measure(shorter)
    prompt = ours.prompt(sample(*messages[:3])).input_ids.tolist()
    assert prompt == bare.prompt(sample(user("a"), assistant("b"), user("c"))).input_ids.tolist()
    with pytest.raises(ValueError, match="think 'drop' is not one of"):
        processor(think="drop")


def test_a_call_without_arguments_has_none():
    ours = sample(user("a"), call({"name": "f"}))
    assert '{"name": "f", "arguments": {}}' in ours.messages[1].content


def test_a_tools_answer_in_parts_is_their_text():
    parts = [{"type": "text", "text": "31"}, {"type": "text", "text": " degrees"}]
    turns = (user("a"), call({"name": "f"}), {"role": "tool", "content": parts}, assistant("b"))
    assert sample(*turns).messages[2].content == "31 degrees"

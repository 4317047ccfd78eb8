"""Our text is what the donors' own templates render, for any conversation; hypothesis draws them.

The oracle is transformers' `apply_chat_template` with the template files. A drawn conversation is
a list of steps; each is the rows of a data file and, written down on its own, the one turn that
the template is given for them.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.data.samples import GOLDEN, processor
from vlm.data.chat import Think, render, render_prompt
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.schema import Sample

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATES = (GOLDEN / "model/chat_template.jinja", EXAMPLES / "digits/chat_template.jinja")
TOKENIZER = PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "model/tokenizer.json"))
VISION = {"image": "<|vision_start|><|image_pad|><|vision_end|>"}

WORDS = ["cat", " dog", "\n", "\n\n", "  ", "7", "é", "图", "🙂", "{{ 1 }}", "{% x %}", "<b>", "&"]
WORDS += ["<|im_end|>", "<|im_start|>user\n", "<think>", "</think>", "<tool_call>", "{query}", "'"]
texts = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
seen_texts = st.lists(st.sampled_from([*WORDS, "<image>"]), max_size=6).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["get_weather", "查询"])
functions = st.fixed_dictionaries({"name": names, "parameters": st.dictionaries(texts, texts)})


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


@st.composite
def questions(draw):
    """One or two messages of a user are one turn."""
    parts = draw(st.lists(seen_texts, min_size=1, max_size=2))
    return [{"role": "user", "content": part} for part in parts], "user", "".join(parts)


@st.composite
def calls(draw):
    """Words, maybe; then calls in one of the shapes of data files."""
    arguments = st.dictionaries(texts, json_values, max_size=2)
    drawn = draw(st.lists(st.tuples(names, arguments), min_size=1, max_size=2))
    called = [{"name": name, "arguments": given} for name, given in drawn]
    words = draw(texts)
    lines = [f"<tool_call>\n{dumps(call)}\n</tool_call>" for call in called]
    shape = draw(st.sampled_from(["text", "object", "parameters", "openai"]))
    if shape == "openai":
        listed = [
            {"id": "1", "type": "function", "function": c | {"arguments": dumps(c["arguments"])}}
            for c in called
        ]
        rows = [{"role": "assistant", "content": words or None, "tool_calls": listed}]
    else:
        given_as = {
            "text": dumps,
            "object": dict,
            "parameters": lambda c: dumps({"name": c["name"], "parameters": c["arguments"]}),
        }[shape]
        rows = [{"role": "tool_call", "content": given_as(call)} for call in called]
        if words:
            rows.insert(0, {"role": "assistant", "content": words})
    return rows, "assistant", words + "\n".join(lines)


@st.composite
def tool_answers(draw):
    answers = draw(st.lists(seen_texts | st.dictionaries(texts, texts), min_size=1, max_size=2))
    role = draw(st.sampled_from(["tool", "tool_response"]))
    rows = [{"role": role, "content": answer} for answer in answers]
    shown = (answer if isinstance(answer, str) else dumps(answer) for answer in answers)
    text = "\n".join(f"<tool_response>\n{answer}\n</tool_response>" for answer in shown)
    return rows, "user", text


@st.composite
def conversations(draw):
    """(row of a data file, turns as a template takes them), ending with the assistant."""
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        steps.append(draw(questions()))
        for _ in range(draw(st.integers(0, 2))):
            steps += [draw(calls()), draw(tool_answers())]
        words = draw(st.lists(texts, min_size=1, max_size=2))
        said = [{"role": "assistant", "content": part} for part in words]
        steps.append((said, "assistant", "".join(words)))
    rows = [row for step in steps for row in step[0]]
    turns = [{"role": role, "content": text} for _, role, text in steps]
    system = draw(st.none() | texts)
    if system is not None:
        rows.insert(0, {"role": "system", "content": system})
    row = {"messages": rows}
    tools = draw(st.lists(functions, max_size=2))
    prompt = "You are a helpful assistant." if system is None else system
    if tools:
        wrapped = [{"type": "function", "function": tool} for tool in tools]
        row["tools"] = draw(st.sampled_from([wrapped, tools, dumps(tools), [*map(dumps, wrapped)]]))
        prompt += (
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            + "\n".join(map(dumps, wrapped))
            + "\n</tools>\n\nFor each function call, return a json object with function name and "
            "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )
    turns.insert(0, {"role": "system", "content": prompt})
    row["images"] = ["x.png"] * dumps(row["messages"]).count("<image>")
    return row, turns


def sample_of(row) -> Sample:
    return parse_row(row, "data.jsonl:1", RowContext(GOLDEN))


def as_parts(turn):
    """Content as a list of parts, which is how templates take images."""
    parts = []
    for number, text in enumerate(turn["content"].split("<image>")):
        parts += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}] * bool(text)
    return turn | {"content": parts}


def expected(turns, template, **options):
    """What the template renders; without the block of an empty system prompt, which ours omits."""
    text = TOKENIZER.apply_chat_template(
        [as_parts(turn) for turn in turns], chat_template=template, tokenize=False, **options
    )
    return text if turns[0]["content"] else text.removeprefix("<|im_start|>system\n<|im_end|>\n")


def text_of(spans):
    return "".join(span.text for span in spans).replace("<image>", VISION["image"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.parts[-3])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(drawn=conversations())
def test_any_conversation_is_rendered_as_the_donors_template_does(path, drawn):
    row, turns = drawn
    template = path.read_text()
    whole = sample_of(row)
    assert text_of(render(whole)) == expected(turns, template)
    while row["messages"][-1]["role"] in ("assistant", "tool_call"):
        row["messages"].pop()
    assert text_of(render_prompt(sample_of(row))) == expected(
        turns[:-1], template, add_generation_prompt=True
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(drawn=conversations())
def test_learnt_is_what_the_assistant_says_and_the_end_of_its_turns(drawn):
    row, turns = drawn
    spans = render(sample_of(row))
    assert {span.weight for span in spans} <= {0.0, 1.0}
    learnt = "".join(span.text for span in spans if span.weight)
    said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert learnt == "".join(f"{text}<|im_end|>\n" for text in said)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn=conversations())
def test_ids_are_those_of_the_whole_text_and_a_prompts_begin_them(drawn):
    """Where an answer begins is the only cut: there the model is, when it speaks."""
    row, _ = drawn
    row |= {"images": ["images/sq28.png"] * len(row["images"])}
    ours = processor()
    whole = ours.encode(sample_of(row)).input_ids.tolist()
    spans = text_of(render(sample_of(row))).replace("<|image_pad|>", "")
    kept = [i for i in whole if i != ours.config.image_token_id]
    assert TOKENIZER.decode(kept, skip_special_tokens=False) == spans
    while row["messages"][-1]["role"] in ("assistant", "tool_call"):
        row["messages"].pop()
    prompt = ours.prompt(sample_of(row)).input_ids.tolist()
    assert whole[: len(prompt)] == prompt


QWEN3 = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}
{%- if m.role == 'user' and not (m.content.startswith('<tool_response>')
    and m.content.endswith('</tool_response>')) -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content -%}
{%- if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor -%}
"""
"""What Qwen3's template does with the thoughts of earlier answers."""


@settings(max_examples=120, deadline=None, derandomize=True)
@given(drawn=conversations())
def test_stripped_history_is_what_qwen3s_template_leaves(drawn):
    row, turns = drawn
    text = TOKENIZER.apply_chat_template(turns, chat_template=QWEN3, tokenize=False)
    if not turns[0]["content"]:
        text = text.removeprefix("<|im_start|>system\n<|im_end|>\n")
    think: Think = "strip_history"
    assert text_of(render(sample_of(row), think=think)) == text.replace("<image>", VISION["image"])

"""Damaged rows and media: a BadSample or an Example, and never anything else, a crash or a hang."""

import json
import random
from copy import deepcopy
from itertools import islice

import pytest

from tests.data.samples import index_of, processor, row, write_image, write_jsonl
from tests.data.videos import write_video
from vlm.data.ledger import Entry
from vlm.data.loader import StepDataset, make_plan, open_loader
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.processor import Example
from vlm.data.schema import BadSample
from vlm.data.sources import open_sources

IN_A_CASE = 20
TIMEOUT = 60
"""Seconds that a worker may take for one step, after which it is called stuck."""
ODD = [
    None,
    True,
    -1,
    0,
    10**400,
    1e308,
    float("nan"),
    "",
    " ",
    "\0",
    "\ud800",
    "<image>",
    "🙂" * 9,
]
ODD += [
    [],
    {},
    [[]],
    {"": None},
    "<video>",
    "<bbox>",
    "<|im_end|>",
    "<|image_pad|>",
    "../x.png",
    "/",
]
ODD += [
    "data:image/png;base64,AAAA",
    "http://x.example/a.png",
    "file://%",
    ".",
    "clip.mp4",
    "a.png",
]


def seeds():
    """A row of every format and of every kind of media."""
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>b</think>c"},
    ]
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}]
    objects = {"ref": ["cat"], "bbox": [[1, 2, 30, 40]]}
    return [
        row("<image>?", images=["a.png"]),
        row("<image>?", images=["b.jpg"], loss_scale=0.5),
        row("<video>?") | {"videos": ["clip.mp4"]},
        row("<video>?") | {"videos": [["a.png", "b.jpg", "a.png"]]},
        row("<image>find <ref-object>", "<bbox>", ["a.png"], objects=objects),
        {
            "messages": messages,
            "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
        },
        {"messages": [messages[0], {"role": "assistant", "tool_calls": [call], "content": None}]},
        {"messages": [{"role": "user", "content": parts}, messages[1]]},
        {
            "conversations": [
                {"from": "human", "value": "<image>a"},
                {"from": "gpt", "value": "b"},
            ],
            "image": "a.png",
        },
    ]


def write_media(folder):
    write_image(folder / "a.png", 60, 40)
    write_image(folder / "b.jpg", 64, 90)
    write_video(folder / "clip.mp4", 8, 40, 60, 4)
    return {name: (folder / name).read_bytes() for name in ("a.png", "b.jpg", "clip.mp4")}


def nodes(value, found):
    """(container, key) of everything inside a row."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            nodes(value[key], found)
    return found


def mutate_value(rng, value):
    match rng.randrange(6):
        case 0:
            return [value]
        case 1:
            return {"value": value}
        case 2 if isinstance(value, str):
            place = rng.randrange(len(value) + 1)
            return (
                value[:place]
                + str(rng.choice([o for o in ODD if isinstance(o, str)]))
                + value[place:]
            )
        case 3 if isinstance(value, list):
            return value + deepcopy(value)
        case 4 if isinstance(value, str):
            return value[: rng.randrange(len(value) + 1)]
        case _:
            return deepcopy(rng.choice(ODD))


def damage(rng, content: bytes) -> bytes:
    """Bytes cut, overwritten, repeated or random."""
    if not content:
        return b"\xff"
    start, size = rng.randrange(len(content)), rng.randrange(1, 64)
    match rng.randrange(5):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + rng.randbytes(size) + content[start + size :]
        case 2:
            return content[:start] + content[start + size :]
        case 3:
            head = rng.randrange(min(64, len(content)))  # where a header is, sizes above all
            return content[:head] + rng.randbytes(4) + content[head + 4 :]
        case _:
            return rng.randbytes(size)


def line_of(rng, folder, number, media) -> bytes:
    """A damaged row; where its media are damaged they are files of its own."""
    given = deepcopy(rng.choice(seeds()))
    kind = rng.randrange(4)
    if kind == 0:
        names = {name: f"{number}-{name}" for name in media}
        text = json.dumps(given)
        for name, own in names.items():
            text = text.replace(f'"{name}"', f'"{own}"')
            (folder / own).write_bytes(damage(rng, media[name]))
        return text.encode()
    if kind == 1:
        return damage(rng, json.dumps(given).encode()).replace(b"\n", b" ")
    for _ in range(rng.randrange(1, 4)):
        if not given:
            break
        container, key = rng.choice(nodes(given, []))
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = mutate_value(rng, container[key])
    return json.dumps(given).encode()


def write_fuzz(folder, seed):
    """A file of damaged rows between two good ones."""
    rng, media = random.Random(seed), write_media(folder)
    lines = [line_of(rng, folder, number, media) for number in range(IN_A_CASE)]
    return write_jsonl(folder / "data.jsonl", [row("first"), *lines, row("last")])


def outcome(source, chunk, number, ours) -> str:
    """`good` or the reason; any other exception is a failure of the test."""
    try:
        sample = source.parse(chunk.rows[number], chunk.places[number])
        example = ours.encode(sample)
    except BadSample as error:
        assert error.sample_id == f"{source.path}:{chunk.places[number].line}"
        assert error.reason and "\n" not in error.reason
        return error.reason
    assert isinstance(example, Example) and example.length <= 500
    return "good"


def fuzz(folder, seed):
    """Each row alone, twice; then all of them through the index and a real worker."""
    file, ours = write_fuzz(folder, seed), processor(max_length=500, fps_max_frames=8)
    (source,) = open_sources([str(file)], media_root=folder)
    found = [
        [
            outcome(source, chunk, n, ours)
            for chunk in source.chunks()
            for n in range(len(chunk.rows))
        ]
        for _ in range(2)
    ]
    assert found[0] == found[1], "a row is now good and now bad"
    assert found[0][0] == found[0][-1] == "good"
    index, bad = index_of([file], ours)
    plan = make_plan(index, index.length.astype(float), len(index), seed, 1, Budget(tokens=500))
    with open_loader(StepDataset(index, ours, plan, 0), Position(0, 0), 1, False, TIMEOUT) as steps:
        (step,) = islice(steps, 1)
    lines = {int(entry.id.rpartition(":")[2]) for entry in [*bad, *step.bad]}
    assert all(isinstance(entry, Entry) for entry in step.bad)
    assert len(lines) + step.samples == sum(len(chunk.rows) for chunk in source.chunks())
    return [*found[0]]


@pytest.mark.parametrize("seed", range(10))
def test_200_damaged_rows(tmp_path, seed):
    fuzz(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_2000_damaged_rows(tmp_path, seed):
    fuzz(tmp_path, seed)


def test_the_damage_is_of_many_kinds(tmp_path):
    reasons = []
    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        reasons += fuzz(tmp_path / str(seed), seed)
    good = reasons.count("good") - 8
    assert 5 < good < 60 and len(set(reasons)) > 15, "nothing, or everything, is bad"

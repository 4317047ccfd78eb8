"""Rows of the training format as a benchmark, against a server whose answers are known."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from eval import native
from eval.benchmarks import Benchmark, load
from eval.options import Options
from eval.result import EvalError, Result, SampleResult
from tests.eval import families
from tests.eval.known_endpoint import knowing

CHOICE = "\nA. red\nB. green\nC. blue"
ROWS = [
    ("What is no. 1?", "Paris"),
    ("What is no. 2?", "Paris"),
    ("What is no. 3?", "abcd"),
    ("What is no. 4?", "20"),
    (f"What is no. 5?{CHOICE}", "B"),
    (f"What is no. 6?{CHOICE}", "C"),
    (f"What is no. 7?{CHOICE}", "B"),
    ("Plan A. or what is no. 8?", "A"),  # lists no options
]
ANSWERS = {
    "no. 1?": " Paris\n",
    "no. 2?": "**ANSWER: PARIS**",
    "no. 3?": "abcx",
    "no. 4?": "21",
    "no. 5?": "It is green, so B.",
    "no. 6?": "ANSWER: B",
    "no. 7?": "I am not sure",
    "no. 8?": "<think>B?</think>\n\nA",
}
SCORES = {
    "exact_match": [1, 0, 0, 0, 1, 0, 0, 1],
    "normalised_match": [1, 1, 0, 0, 1, 0, 0, 1],
    "anls": [1, 1, 0.75, 0.5, 1, 0, 0, 1],
    "relaxed_accuracy": [1, 1, 0, 1, 1, 0, 0, 1],
    "choice": [None, None, None, None, 1, 0, 0, None],
}
"""By hand: abcx misses abcd in one letter of four, 21 misses 20 in one of two; 21 is 5 % off."""


def ask(
    server, folder: Path, file: Path, benchmark: Benchmark | None = None, **changes
) -> tuple[Result, list[SampleResult]]:
    options = Options(
        api_base=f"{server.url}/v1",
        model="fake-vl",
        checkpoint="mine",
        folder=folder / "result",
        data_root=file,
        retries=0,
    )
    return native.run(benchmark or load("custom"), replace(options, **changes))


def own_yaml(folder: Path, **changes) -> Benchmark:
    """`configs/eval/custom.yaml`, copied and changed."""
    content = yaml.safe_load((Path(__file__).parents[2] / "configs/eval/custom.yaml").read_text())
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content | {"name": "mine"} | changes))
    return load(str(path))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(folder, JSONL file, server) after every row of ROWS has been asked."""
    folder = tmp_path_factory.mktemp("custom")
    file = families.own(folder / "held_out.jsonl", ROWS)
    with knowing(ANSWERS) as server:
        result, samples = ask(server, folder, file)
        yield folder, file, server, result, samples


def test_exact_match_is_the_default(asked):
    *_, server, result, samples = asked
    assert [sample.score for sample in samples] == SCORES["exact_match"]
    assert (result.score, result.n, result.metric) == (37.5, 8, "exact match")
    assert [sample.extracted for sample in samples] == [
        *("Paris", "PARIS", "abcx", "21"),
        *("B", "B", None, "A"),
    ]
    assert result.unparsed == 1 / 8
    assert samples[0].raw == " Paris\n" and samples[0].gold == "Paris"
    assert samples[4].question == f"What is no. 5?{CHOICE}"
    for number, sample in enumerate(samples, 1):
        (image,) = sample.images
        assert base64.b64decode(image.partition(",")[2]) == families.png(number)
    assert len(server.requests) == 8


@pytest.mark.parametrize("metric", [name for name in SCORES if name != "exact_match"])
def test_the_metric_is_the_yamls(metric, asked):
    folder, file, server, *_ = asked
    benchmark = own_yaml(folder, metric=metric, native_metric=metric)
    result, samples = ask(server, folder, file, benchmark, resume=True)
    expected = SCORES[metric]
    assert [sample.score for sample in samples] == pytest.approx(expected)
    having = [score for score in expected if score is not None]
    assert result.score == pytest.approx(100 * sum(having) / len(having), abs=0.005)
    assert result.metric == metric and len(server.requests) == 8


def test_a_metric_that_there_is_not(asked):
    folder, file, server, *_ = asked
    benchmark = own_yaml(folder, native_metric="bleu")
    with pytest.raises(
        EvalError, match=r"graftvl_custom reports .*anls.*not the one that is meant"
    ):
        ask(server, folder, file, benchmark, resume=True)


def write(file: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def turns(*contents: str, **further: object) -> dict:
    """Messages by user and assistant in turn, after a system message where it begins with one."""
    roles = ["user", "assistant"] * len(contents)
    if contents[0].startswith("You are"):
        roles = ["system", *roles]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": messages, **further}


def test_turns_system_several_images_and_a_video_arrive_in_order(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(families.png(number))
    families.video(tmp_path / "v.mp4", 40)
    uri = f"data:image/png;base64,{base64.b64encode(families.png(3)).decode()}"
    row = turns(
        "You are brief.",
        "One <image>, two <image>: same?",
        "No.",
        "<image><video>What is no. 1?",
        "red",
        images=["1.png", "2.png", uri],
        videos=["v.mp4"],
    )
    with knowing({"no. 1?": "red"}) as server:
        result, _ = ask(
            server, tmp_path, write(tmp_path / "d.jsonl", row, "", turns("no. 1?", "x"))
        )
    assert result.score == 50 and result.n == 2
    request = next(r for r in server.requests if len(r["messages"]) == 4)
    assert [message["role"] for message in request["messages"]] == [
        *("system", "user", "assistant", "user")
    ]
    sent = []
    for message in request["messages"]:
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            value = part[part["type"]]
            sent.append(value if isinstance(value, str) else value["url"].partition(",")[2])
    pictures = [base64.b64encode(families.png(number)).decode() for number in (1, 2, 3)]
    video = base64.b64encode((tmp_path / "v.mp4").read_bytes()).decode()
    assert sent == [
        "You are brief.",
        *("One ", pictures[0], ", two ", pictures[1], ": same?"),
        "No.",
        *(pictures[2], video, "What is no. 1?"),
    ]
    (with_video,) = (p for p in request["messages"][-1]["content"] if p["type"] == "video_url")
    assert with_video["video_url"]["url"].startswith("data:video/mp4;base64,")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not a line of JSON"),
        ({"text": "x"}, "no list of messages"),
        (turns("<image>What?", "x"), "1 <image> tags but 0 images"),
        (turns("<image>What?", "x", images=["gone.png"]), "gone.png: No such file"),
        (turns("What?", "<image>", "And?", "x", images=["a.png"]), "in a message of the assistant"),
        (turns("What?", "x", tools=[{"name": "look"}]), "with boxes or tools cannot be asked"),
        (turns("What?"), "does not end with the assistant's answer"),
        (turns("What?", " "), "does not end with the assistant's answer"),
        (
            turns("<video>What?", "x", videos=[["a.png", "b.png"]]),
            "a video given as a list of frames cannot be sent",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row, reason, tmp_path):
    file = write(tmp_path / "held_out.jsonl", turns("What?", "x"), "", row)
    with knowing({}) as server, pytest.raises(EvalError) as error:
        ask(server, tmp_path, file)
    assert str(error.value).startswith(f"{file}:3: ") and reason in str(error.value)
    assert server.requests == []


def test_a_file_without_rows(tmp_path):
    with knowing({}) as server, pytest.raises(EvalError, match="custom has no samples"):
        ask(server, tmp_path, write(tmp_path / "d.jsonl"))


def test_a_limit_takes_the_first_rows(tmp_path):
    file = families.own(tmp_path / "d.jsonl", ROWS)
    with knowing(ANSWERS) as server:
        result, samples = ask(server, tmp_path, file, limit=3)
    assert [sample.question for sample in samples] == [question for question, _ in ROWS[:3]]
    assert result.n == 3 and result.protocol["limit"] == 3

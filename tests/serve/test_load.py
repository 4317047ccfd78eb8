"""200 requests, 32 at a time, four in ten of them malformed, while others hang up in mid-answer.

Every good one must get the answer that our own model gives, whatever runs beside it; every bad
one a 4xx that says why; and the server must be the same processes before and after.
"""

import asyncio
import base64
import io
import json
import random
import socket
import struct
import urllib.request
import zlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import httpx
import pytest
import torch
from PIL.PngImagePlugin import putchunk

from serve.limits import read_limits
from serve.parity_requests import built_in_requests, clip, picture
from serve.request import request_messages
from tests.serve.processes import free_port, living, pids, wait_until
from tests.serve.test_launch_vllm import Server, model  # noqa: F401 - a fixture
from vlm.checkpoint import load_model
from vlm.data.collate import collate
from vlm.data.processor import Processor
from vlm.data.schema import Sample
from vlm.generate import generate

GOOD, DESERTERS, AT_ONCE = 120, 8, 32
NEW = 12
"""Tokens of an answer, at none of which the two likeliest come closer than 1e-4. Engines differ by
1e-5 (`serve/parity.py`), so that answers can be compared exactly."""
LONG = 2000
"""Those of an answer that nobody waits for."""
TO_ANSWER = 90
"""Seconds; vLLM's three tries at an address that never answers take 110."""
BOMBS = 30_000, 13_000
"""Pixels of a side: more than Pillow opens, and less."""


@dataclass(frozen=True)
class Request:
    kind: str
    body: bytes
    good: bool
    words: str
    """The answer, or words of the refusal."""


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):  # noqa: F811
    started = Server(
        model,
        tmp_path_factory.mktemp("load") / "out",
        *("--dtype", "float32", "--", "--max-num-seqs", 16),
        VLLM_CPU_KVCACHE_SPACE="1",
        NO_PROXY="*",
    )
    yield started.wait()
    started.stop()
    assert not living(started.group)


def body(content: str | list, **options) -> bytes:
    """A request for a greedy answer."""
    messages = [{"role": "user", "content": content}]
    asked = {"model": "Qwen3-VL", "messages": messages, "temperature": 0, "max_tokens": NEW}
    return json.dumps(asked | options).encode()


def good_requests(folder: Path) -> list[Request]:
    """Every kind of the parity gate, each time with other words, and the answers to them."""
    kinds = islice(cycle(built_in_requests()), GOOD)
    samples = [ask_for(kind, number) for number, kind in enumerate(kinds)]
    answers = own_answers(folder, samples)
    return [
        Request(
            kind=sample.id,
            body=body("", messages=request_messages(sample), stream=bool(number % 2)),
            good=True,
            words=answer,
        )
        for number, (sample, answer) in enumerate(zip(samples, answers, strict=True))
    ]


def ask_for(sample: Sample, number: int) -> Sample:
    """The sample with a number at its end."""
    *before, last = sample.messages
    return replace(sample, messages=(*before, replace(last, content=f"{last.content} {number}")))


def own_answers(folder: Path, samples: list[Sample]) -> list[str]:
    """By our own generation."""
    processor = Processor.from_pretrained(folder, read_limits(folder))
    ours = load_model(folder, torch.float32, "cpu").eval()
    answers = []
    for start in range(0, len(samples), 8):
        examples = [processor.prompt(sample) for sample in samples[start : start + 8]]
        prompts = collate(examples, ours.config)
        ids = generate(ours, prompts, max_new_tokens=NEW, stop_ids=processor.stop_ids)
        answers += map(processor.decode, ids)
    whole = [before_half_a_character(answer) for answer in answers]
    assert sum(map(len, whole)) > 5 * len(whole)
    return whole


def before_half_a_character(answer: str) -> str:
    """What vLLM surely says of an answer: at its end it keeps back what is no whole character."""
    return answer.partition("\ufffd")[0]


def bad_requests(silent: int, stream: bool) -> list[Request]:
    """One for each way to be malformed; `silent` is the port of a server that never answers."""
    small, movie = picture(40, 30), clip(frames=24, side=56)
    seen = picture(112, 84)  # by good requests too, which its refusal must not hurt
    refused = free_port()
    ask = partial(body, stream=stream)
    bodies = {
        "bad base64": (ask([image(b"", "@@@")]), "base64"),
        "no base64": (ask([image_at("data:image/png,abc")]), "base64"),
        "six images": (ask([image(small)] * 6), "5 image"),
        "three videos": (ask([video(movie)] * 3), "2 video"),
        "huge image": (ask([image(bomb(BOMBS[0]))]), "900000000 pixels"),
        "huge image that Pillow opens": (ask([image(bomb(BOMBS[1]))]), "169000000 pixels"),
        "not an image": (ask([image(b"no image")]), "cannot identify image"),
        "truncated image": (ask([image(picture(300, 300)[:5000])]), "truncated"),
        "truncated video": (ask([video(movie[: len(movie) // 2])]), "video"),
        "unknown part": (ask([{"type": "hologram", "hologram": "x"}]), "hologram"),
        "wrong model": (ask("?", model="nobody"), "nobody"),
        "empty messages": (ask("?", messages=[]), "at least one message"),
        "missing messages": (b'{"model": "Qwen3-VL"}', "body.messages"),
        "no JSON": (ask("?")[:-9], "JSON"),
        "max_tokens below 1": (ask("?", max_tokens=-1), "max_tokens"),
        "max_tokens above max_model_len": (ask("?", max_tokens=9000), "max_model_len=8192"),
        "long prompt": (
            ask([image(seen), {"type": "text", "text": "word " * 9000}]),
            "8192 tokens",
        ),
        "address that refuses": (ask([image_at(f"http://127.0.0.1:{refused}/a")]), "connect"),
        "address that is silent": (ask([image_at(f"http://127.0.0.1:{silent}/a")]), "Timeout"),
        "file": (ask([image_at("file:///etc/hostname")]), "local files"),
    }
    return [Request(kind, content, False, words) for kind, (content, words) in bodies.items()]


def image(content: bytes, text: str = "") -> dict:
    return image_at(f"data:image/png;base64,{base64.b64encode(content).decode()}{text}")


def image_at(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def video(content: bytes) -> dict:
    url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


def bomb(side: int) -> bytes:
    """A whole PNG, black and square, of few bytes."""
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    putchunk(file, b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    putchunk(file, b"IDAT", zlib.compress(bytes((1 + (side + 7) // 8) * side)))
    putchunk(file, b"IEND")
    return file.getvalue()


async def ask(client: httpx.AsyncClient, content: bytes) -> tuple[int, str]:
    """Status, and the answer or the reason why there is none."""
    async with client.stream("POST", "/v1/chat/completions", content=content) as answer:
        if answer.headers["content-type"].startswith("text/event-stream"):
            data = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
            assert data.pop() == "[DONE]"
            deltas = [choice["delta"] for row in data for choice in json.loads(row)["choices"]]
            return answer.status_code, "".join(delta.get("content") or "" for delta in deltas)
        said = json.loads(await answer.aread())
        if answer.status_code == 200:
            return 200, said["choices"][0]["message"]["content"]
        return answer.status_code, said["error"]["message"]


async def desert(client: httpx.AsyncClient) -> None:
    """Hang up after the first words of a long answer."""
    content = body("Tell me all.", stream=True, max_tokens=LONG, ignore_eos=True)
    async with client.stream("POST", "/v1/chat/completions", content=content) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line and json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]:
                return


async def run(url: str, requests: list[Request | None]) -> list[tuple[Request, int, str]]:
    """Every request with what came back; None stands for a client that hangs up."""
    gate = asyncio.Semaphore(AT_ONCE)
    headers = {"Content-Type": "application/json"}
    limits = httpx.Limits(max_keepalive_connections=0)  # one that the server closes is a race
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=TO_ANSWER, limits=limits, trust_env=False
    ) as client:

        async def one(request: Request | None) -> tuple | None:
            async with gate:
                if request is None:
                    return await desert(client)
                return (request, *await ask(client, request.body))

        outcomes = await asyncio.gather(*map(one, requests))
    return [outcome for outcome in outcomes if outcome]


def metric(url: str, name: str) -> float:
    """One of vLLM's own counts."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        rows = answer.read().decode().splitlines()
    [row] = [row for row in rows if row.startswith(f"vllm:{name}{{")]
    return float(row.split()[-1])


@pytest.mark.slow
def test_200_requests_of_which_many_are_malformed(server, model):  # noqa: F811
    url, processes = f"http://127.0.0.1:{server.port}", set(pids(server.group))
    with socket.create_server(("127.0.0.1", 0), backlog=AT_ONCE) as silent:
        good = good_requests(model)
        assert len({request.words for request in good}) > GOOD / 2, "or mixed-up answers would pass"
        port = silent.getsockname()[1]
        bad = [request for n in range(4) for request in bad_requests(port, stream=bool(n % 2))]
        requests = [*good, *bad, *[None] * DESERTERS]
        random.Random(0).shuffle(requests)
        outcomes = asyncio.run(run(url, requests))
    assert len(outcomes) == 200
    wrong = []
    for request, status, text in outcomes:
        answered = status == 200 and before_half_a_character(text) == request.words
        refused = 400 <= status < 500 and request.words in text
        if not (answered if request.good else refused):
            wrong.append((request.kind, status, text[:200], request.words))
    assert not wrong, (len(wrong), wrong)
    assert wait_until(lambda: metric(url, "num_requests_running") == 0)
    generated = metric(url, "generation_tokens_total")
    assert generated < GOOD * NEW + LONG, "nobody waits for what the deserters asked for"
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert answer.status == 200
    [(_, status, text)] = asyncio.run(run(url, good[:1]))
    assert (status, before_half_a_character(text)) == (200, good[0].words)
    assert set(pids(server.group)) == processes

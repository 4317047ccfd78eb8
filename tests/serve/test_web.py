"""The page: its functions as they are, and all of it in a real browser."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest

from serve.endpoint import Endpoint
from serve.web import EMPTY, responder
from tests.data.videos import write_video
from tests.serve.fake_endpoint import serving
from tests.serve.processes import ROOT, free_port

PICTURE = ROOT / "tests/golden/images/sq56.png"
SETTINGS = ("", "auto", 0.0, 64)


def ask(respond, text, conversation=EMPTY, files=None, settings=SETTINGS):
    """All that the page is given."""

    async def collect():
        message = {"text": text, "files": files or []}
        return [step async for step in respond(message, conversation, *settings)]

    return asyncio.run(collect())


def test_an_answer_grows_and_the_next_question_carries_the_conversation():
    with serving() as server:
        respond = responder(Endpoint(server.url))
        steps = ask(respond, "say one two", files=[str(PICTURE)])
        texts = ["".join(shown[1]["content"]) for shown, *_ in steps if len(shown) > 1]
        assert "one" in texts and texts[-1] == "one two"
        shown, conversation, box, notice = steps[-1]
        assert (
            shown[0]["content"] == [{"path": str(PICTURE)}, "say one two"]
            and not box
            and not notice
        )
        ask(respond, "and?", conversation, settings=("Be brief.", "off", 0.5, 8))
        request = server.requests[-1]
    assert [m["role"] for m in request["messages"]] == ["system", "user", "assistant", "user"]
    assert request["messages"][0]["content"] == "Be brief."
    assert request["messages"][1]["content"][0]["type"] == "image_url"
    assert request["messages"][2]["content"] == "one two"
    assert (request["temperature"], request["max_tokens"]) == (0.5, 8)
    assert request["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_video_goes_to_the_endpoint_and_onto_the_page(tmp_path):
    clip = tmp_path / write_video(tmp_path / "clip.mp4", 8, 60, 90, 4)
    with serving() as server:
        shown, *_ = ask(responder(Endpoint(server.url)), "what?", files=[str(clip)])[-1]
        part, _ = server.requests[0]["messages"][0]["content"]
    assert shown[0]["content"] == [{"path": str(clip)}, "what?"]
    kind, _, data = part["video_url"]["url"].partition(",")
    assert kind == "data:video/mp4;base64" and base64.b64decode(data) == clip.read_bytes()


@pytest.mark.parametrize(
    ("text", "files", "reason"),
    [
        ("fail 400", [], "refuses it: 400: as asked for"),
        ("break", [], "broke off"),
        ("what?", ["/nowhere/a.png"], "/nowhere/a.png does not exist"),
        ("an <image>", [], "1 <image> tags but 0 images"),
        (" ", [], "empty"),
    ],
)
def test_a_failure_is_told_and_gives_the_message_back(text, files, reason):
    with serving() as server:
        steps = ask(responder(Endpoint(server.url)), text, files=files)
    *rest, notice = steps[-1]
    assert reason in notice and rest == [[], EMPTY, {"text": text, "files": files}]


@contextmanager
def process(arguments, ready, **options):
    """A process whose output has said `ready`; ended by SIGTERM."""
    child = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    try:
        said = ""
        while ready not in said:
            line = child.stdout.readline()
            assert line, f"{arguments} ended: {said}"
            said += line
        yield said.strip()
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)
        child.stdout.close()


@contextmanager
def opened(browser, url, tmp_path):
    """The page of a server at `url`, in the browser; nothing but it may be asked for anything."""
    port = free_port()
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with process(["serve/web.py", url, "--port", port], "the page is at", env=environment):
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{port}")
        yield page
        page.close()
    own = (f"http://127.0.0.1:{port}/", "data:", "blob:")
    assert asked and not [other for other in asked if not other.startswith(own)]
    assert not list(tmp_path.glob("graftvl-web-*"))  # no upload is left behind


@pytest.mark.browser
def test_an_image_and_a_question_are_answered_on_the_page(browser, tmp_path):
    with process(
        ["tests/serve/fake_endpoint.py"], "http", env=os.environ | {"PYTHONPATH": "."}
    ) as url:
        with opened(browser, url, tmp_path) as page:
            page.set_input_files("input[type=file]", PICTURE)
            page.wait_for_selector(".thumbnail-item")
            page.fill("textarea", "say a red square")
            page.press("textarea", "Enter")
            page.get_by_test_id("bot").get_by_text("a red square").wait_for()
            page.get_by_test_id("user").locator("img").wait_for()
            page.fill("textarea", "hang")
            page.press("textarea", "Enter")
            half = page.get_by_test_id("bot").get_by_text("wait")
            half.wait_for()  # shown while the server has not come to the end
            page.get_by_role("button", name="Stop").click()
            half.wait_for(state="detached")
        with urllib.request.urlopen(f"{url}/requests") as answer:
            request, _ = json.load(answer)
    image, text = request["messages"][-1]["content"]
    sent = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert sent == PICTURE.read_bytes() and text["text"] == "say a red square"


@pytest.mark.browser
def test_an_endpoint_that_goes_down_is_told_on_the_page(browser, tmp_path):
    with ExitStack() as stack:
        environment = os.environ | {"PYTHONPATH": "."}
        with process(["tests/serve/fake_endpoint.py"], "http", env=environment) as url:
            page = stack.enter_context(opened(browser, url, tmp_path))
        page.fill("textarea", "hello?")
        page.press("textarea", "Enter")
        page.get_by_text("is the server running?").wait_for()
        assert page.input_value("textarea") == "hello?"


def test_an_endpoint_that_is_not_there_is_one_sentence():
    command = [sys.executable, "serve/web.py", f"http://127.0.0.1:{free_port()}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "is the server running?" in result.stderr

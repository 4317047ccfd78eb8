"""The launcher with the real vLLM: its limits in force, and nothing left after it.

The model is a tiny hybrid, exported. A server takes about a minute to start on two cores.
"""

import base64
import io
import itertools
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serve.processes import (
    Launcher,
    command_line,
    free_port,
    living,
    pids,
    shared_memory,
    wait_until,
)
from tests.tiny import write_hybrid

TO_START = 300
ENDS_OF_MEDIA = 2
"""Tokens that open and close an image or a video."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("vllm")
    from serve.export import ExportOptions, export

    folder = tmp_path_factory.mktemp("served")
    return export(ExportOptions(write_hybrid(folder / "model"), folder / "export"))


class Server:
    """A launcher, and requests to the vLLM behind it."""

    def __init__(self, model: Path, output: Path, *options: object, **variables: str) -> None:
        self.port = free_port()
        self.launcher = Launcher(output, model, "--port", self.port, *options, **variables)
        self.group, self.headers = 0, {"Content-Type": "application/json"}

    def wait(self) -> "Server":
        self.launcher.until("serving Qwen3-VL", TO_START)
        self.group = self.launcher.group()
        return self

    def ask(self, *media: dict, text: str = "What is this?", **sampling) -> tuple[int, dict]:
        """Status and body of one request."""
        content = [*media, {"type": "text", "text": text}]
        body = {"model": "Qwen3-VL", "messages": [{"role": "user", "content": content}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body | {"max_tokens": 1} | sampling).encode(),
            self.headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=TO_START) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def tokens(self, *media: dict) -> int:
        """Those that the media add to a prompt, without the ones that open and close them."""
        counts = []
        for given in (media, ()):
            status, body = self.ask(*given)
            assert status == 200, body
            counts.append(body["usage"]["prompt_tokens"])
        return counts[0] - counts[1] - ENDS_OF_MEDIA * len(media)

    def stop(self) -> None:
        if self.launcher.process.poll() is None:
            assert self.launcher.send(signal.SIGTERM) == 0


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    started = Server(model, tmp_path_factory.mktemp("server") / "out")
    yield started.wait()
    started.stop()


def image(width: int, height: int) -> dict:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return {"type": "image_url", "image_url": {"url": as_url("image/jpeg", file.getvalue())}}


def video(seconds: int, width: int, height: int, folder: Path) -> dict:
    import cv2

    path, rate = folder / "clip.mp4", 5
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
    for number in range(seconds * rate):
        writer.write(np.full((height, width, 3), number % 256, np.uint8))
    writer.release()
    return {"type": "video_url", "video_url": {"url": as_url("video/mp4", path.read_bytes())}}


def as_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.slow
def test_an_image_takes_as_many_tokens_as_max_pixels_allows(server):
    assert server.tokens(image(1400, 1400)) == 35 * 35  # 980 x 980 pixels, 28 x 28 a token
    assert server.tokens(image(56, 84)) == 2 * 3
    assert server.tokens(*[image(1400, 1400)] * 5) == 5 * 35 * 35


@pytest.mark.slow
def test_a_video_takes_12_frames_of_at_most_video_max_pixels(server, tmp_path):
    clip = video(60, 448, 448, tmp_path)
    assert server.tokens(clip) == 6 * 8 * 8  # two frames a token in time, 224 x 224 pixels
    assert server.tokens(clip, clip) == 2 * 6 * 8 * 8
    status, body = server.ask(clip, clip, clip)
    assert status == 400 and "2 video" in json.dumps(body)


@pytest.mark.slow
def test_a_sixth_image_and_a_ninth_thousand_of_tokens_are_refused(server):
    status, body = server.ask(*[image(56, 56)] * 6)
    assert status == 400 and "5 image" in json.dumps(body)
    status, body = server.ask(text="word " * 9000)
    assert status == 400 and "8192" in json.dumps(body)


@pytest.mark.slow
def test_an_answer_is_no_longer_than_max_new_tokens(server):
    status, body = server.ask(max_tokens=3000, ignore_eos=True)
    assert status == 200 and body["usage"]["completion_tokens"] == 2048


@pytest.mark.slow
def test_limits_of_the_environment_and_of_flags(model, tmp_path):
    options = ["--max_images", 1, "--max_new_tokens", 3, "--fps_max_frames", 4, "--api_key", "k"]
    server = Server(model, tmp_path / "out", *options, MAX_PIXELS="200704").wait()
    try:
        assert server.ask()[0] == 401
        server.headers["Authorization"] = "Bearer k"
        assert server.tokens(image(1400, 1400)) == 16 * 16
        assert server.tokens(video(60, 448, 448, tmp_path)) == 2 * 8 * 8
        assert server.ask(image(56, 56), image(56, 56))[0] == 400
        _, body = server.ask(max_tokens=50, ignore_eos=True)
        assert body["usage"]["completion_tokens"] == 3
    finally:
        server.stop()
    assert not living(server.group)


@pytest.mark.soak
def test_20_servers_leave_nothing_behind(model, tmp_path):
    """Ended in every way, while they serve and while they load."""
    ends = ("SIGINT", "SIGTERM", "kill -9 of the launcher", "kill -9 of the server")
    for cycle, end in zip(range(20), itertools.cycle(ends), strict=False):
        server = Server(model, tmp_path / f"out{cycle}")
        launcher = server.launcher
        if cycle % 8 >= 4:  # while it loads, later each time
            launcher.until("vllm serve")
            time.sleep(2 * (cycle % 8))
            server.group = launcher.group()
        else:
            server.wait()
            assert server.ask()[0] == 200
        shared = shared_memory(server.group)
        assert living(server.group) and (shared or cycle % 8 >= 4), (cycle, end)
        if end.startswith("SIG"):
            assert launcher.send(signal.Signals[end]) == 0, (cycle, end)
            assert not living(server.group), (cycle, end)
        elif end.endswith("launcher"):
            launcher.send(signal.SIGKILL)
            assert wait_until(lambda group=server.group: not living(group)), (cycle, end)
        else:
            served = next(p for p in pids(server.group) if "vllm serve" in command_line(p))
            os.kill(served, signal.SIGKILL)
            assert launcher.process.wait(TO_START) == 128 + signal.SIGKILL, (cycle, end)
            assert not living(server.group), (cycle, end)
        assert not [path for path in shared if path.exists()], (cycle, end)

"""One answer, a conversation, both backends, thoughts, and what a person mistypes."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serve.chat import main
from serve.conversation import NO_THOUGHT, Sampling, question, reply
from serve.endpoint import Endpoint
from serve.local import Local
from serve.request import image_uri, request_messages
from serve.terminal import DIM, PLAIN, Chat, Printer
from serve.usage import UsageError
from tests.data.videos import write_video
from tests.serve.fake_endpoint import serving
from tests.serve.processes import free_port
from tests.tiny import GOLDEN_MODEL, write_hybrid
from vlm.data.chat import system_text
from vlm.data.collate import collate
from vlm.data.formats import parse_line, parse_row
from vlm.data.formats.context import RowContext
from vlm.data.image import load_image
from vlm.data.processor import Processor
from vlm.data.schema import BadSample, Message, Sample
from vlm.generate import generate

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "tests/golden/images"
PICTURE = IMAGES / "r84x140.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hybrid(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def local(folder):
    return Local(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    clips = tmp_path_factory.mktemp("clips")
    return clips / write_video(clips / "clip.mp4", 12, 60, 90, 4)


def user(text):
    return Message("user", text)


def answer_to(local, messages, images=(), videos=()):
    """By the processor and generation alone."""
    sample = Sample("x", tuple(messages), tuple(images), tuple(videos))
    processor = Processor.from_pretrained(local.folder)
    batch = collate([processor.prompt(sample)], local.model.config)
    stops = processor.stop_ids
    (ids,) = generate(local.model, batch, max_new_tokens=6, stop_ids=stops)
    return processor.decode(ids)


def test_one_answer_is_what_generation_gives(folder, local, video, capsys):
    asked = ["--image", str(PICTURE), "--video", str(video), "--prompt", "what?"]
    assert main([str(folder), *asked, "--max_new_tokens", "6"]) == 0
    answer = answer_to(local, [user("<image><video>what?")], [PICTURE], [video])
    assert answer and capsys.readouterr().out == answer + "\n"


def test_a_conversation_in_the_terminal(folder, local, video, tmp_path):
    typed = [
        "/nonsense",
        "/image /no/such.png",
        f"/image {PICTURE}",
        f"/video '{video}'",
        "a <image> and?",
        "<|image_pad|>",
        "then?",
        f"/save {tmp_path}/kept.jsonl",
        "/system Be brief.",
        "hello",
        f"/save {tmp_path}/kept.jsonl",
        "/quit",
        "never read",
    ]
    first = answer_to(local, [user("<video>a <image> and?")], [PICTURE], [video])
    turns = [user("<video>a <image> and?"), Message("assistant", first), user("then?")]
    second = answer_to(local, turns, [PICTURE], [video])
    brief = [Message("system", "Be brief."), user("hello")]
    third = answer_to(local, brief)
    cut = "(cut off at max_new_tokens)"
    expected = [
        "/nonsense is no command; /help shows them",
        "/no/such.png does not exist",
        f"{PICTURE} goes with the next message",
        f"{video} goes with the next message",
        f"{first}\n{cut}",
        "has <|image_pad|> in its text; use <image> or <video> "
        "(the message is not part of the conversation)",
        f"{second}\n{cut}",
        f"added to {tmp_path}/kept.jsonl",
        "a new conversation with this system prompt",
        f"{third}\n{cut}",
        f"added to {tmp_path}/kept.jsonl",
    ]
    done = subprocess.run(
        [sys.executable, "serve/chat.py", folder, "--max_new_tokens", "6"],
        cwd=ROOT,
        input="\n".join(typed),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "> ".join(
        ["/help shows the commands\n", *(f"{e}\n" for e in expected), ""]
    )
    lines = (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [parse_line(line, "x", RowContext(Path("/elsewhere"))) for line in lines]
    assert kept[0] == Sample("x", (*turns, Message("assistant", second)), (PICTURE,), (video,))
    assert kept[1] == Sample("x", (*brief, Message("assistant", third)))


def test_both_backends_show_the_model_the_same(local, video):
    """A server's view, rebuilt from the request, equals the local one in every id and pixel."""
    names = ("exif6.jpg", "rgba.png", "plain.webp", "gray.png", "sq112.png", "pal_transparent.png")
    images = [IMAGES / name for name in names]
    conversation = Sample(
        "x",
        (
            Message("system", "Look."),
            user("<image><image>two <image>"),
            user("<video>, joined"),
            Message("assistant", "<think>\nhm\n</think>\n\nyes"),
            user("<image>more<image><image>"),
        ),
        tuple(images),
        (video,),
    )
    with serving() as server:
        answer = Endpoint(server.url).ask(conversation, Sampling(), lambda text: None)
        (request,) = server.requests
    assert answer.text == "saw 3 media"
    sent = local.prompt(parse_row({"messages": request["messages"]}, "x", RowContext(None)), None)
    ours = local.prompt(conversation, None)
    assert torch.equal(sent.input_ids, ours.input_ids)
    assert torch.equal(sent.patches, ours.patches)
    assert "hm" not in local.processor.decode(ours.input_ids.tolist())
    parts = request["messages"][3]["content"]
    files = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    assert base64.b64decode(files[1].partition(",")[2]) == (IMAGES / "sq112.png").read_bytes()


@pytest.mark.parametrize("image", sorted(IMAGES.iterdir()), ids=lambda path: path.name)
def test_a_server_that_only_decodes_sees_our_pixels(image):
    """Without EXIF and without compositing; what is sent untouched is most of it."""
    sent = base64.b64decode(image_uri(image).partition(",")[2])
    decoded = np.array(Image.open(io.BytesIO(sent)).convert("RGB"))
    assert np.array_equal(decoded, load_image(image).numpy())
    assert image_uri(image.read_bytes()) == image_uri(image)


def test_an_answer_says_whether_it_was_cut_off(local):
    conversation = Sample("x", (user("why?"),))
    batch = collate([local.prompt(conversation, None)], local.model.config)
    (ids,) = generate(local.model, batch, max_new_tokens=20, stop_ids=())
    count = next(n for n, token in enumerate(ids) if token != ids[0])
    stopping = Local(local.folder)
    stopping.processor.stop_ids = (ids[count],)
    found = [
        stopping.ask(conversation, Sampling(max_new_tokens=room), lambda text: None)
        for room in (count, count + 1, count + 2)
    ]
    assert [answer.finish for answer in found] == ["length", "stop", "stop"]
    assert {answer.text for answer in found} == {local.processor.decode(ids[:count])}


def test_frames_are_sent_as_vllm_takes_them():
    frames = (IMAGES / "sq56.png", (IMAGES / "sq56.png").read_bytes())
    sample = Sample("x", (user("<video>"),), videos=(frames,))
    (part,) = request_messages(sample)[0]["content"]
    kind, _, data = part["video_url"]["url"].partition(",")
    assert kind == "data:video/jpeg;base64"
    assert [base64.b64decode(frame) for frame in data.split(",")] == [frames[1], frames[1]]


def test_thinking_is_switched_off_as_qwen3_does(folder, local, tmp_path):
    conversation = Sample("x", (user("why?"),))
    plain = local.prompt(conversation, None).input_ids.tolist()
    off = local.prompt(conversation, False).input_ids.tolist()
    encode = local.processor.tokenizer.encode
    assert off[: len(plain)] == plain
    assert off[len(plain) :] == encode(NO_THOUGHT, add_special_tokens=False).ids
    with serving() as server:
        for thinking in (None, True, False):
            Endpoint(server.url).ask(conversation, Sampling(thinking=thinking), lambda text: None)
        told = [request.get("chat_template_kwargs") for request in server.requests]
    assert told == [None, {"enable_thinking": True}, {"enable_thinking": False}]


def test_a_tokenizer_that_cannot_think_is_told(folder, tmp_path, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["added_tokens"][-2:]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main([str(tmp_path), "--prompt", "x", "--thinking", "false"]) == 2
    assert "has no <think> token" in capsys.readouterr().err


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thoughts_are_dim_however_they_arrive(size):
    text = "a < b <think>\nx </think>\n\ny <thin"
    printer = Printer(Screen())
    for start in range(0, len(text), size):
        printer.write(text[start : start + size])
    printer.end()
    shown = f"a < b {DIM}<think>\nx </think>{PLAIN}\n\ny <thin\n"
    assert printer.out.getvalue() == shown


def test_a_thought_reported_apart_reads_the_same_and_is_dropped_later():
    with serving() as server:
        chat = Chat(Endpoint(server.url), Sampling())
        out = io.StringIO()
        chat.ask("think", Printer(out))
        chat.ask("tag", Printer(out))
        chat.ask("and?", Printer(out))  # a tag of the model's is no image
        history = server.requests[-1]["messages"]
    assert out.getvalue().startswith("<think>\nlet me see\n</think>\n\ndone\n")
    assert history[1] == {"role": "assistant", "content": "done"}


def test_tags_are_put_in_front_only_where_the_text_has_none():
    assert question("see <image>", 2, 1) == user("<image><video>see <image>")
    assert "<image>" not in reply("<image>").content


def test_ctrl_c_stops_an_answer_and_not_the_conversation():
    with serving() as server:
        child = subprocess.Popen(
            [sys.executable, "serve/chat.py", server.url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        child.stdin.write("hang\n")
        child.stdin.flush()
        said = ""
        while not said.endswith("wait"):
            said += child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        rest, _ = child.communicate("say more\n", timeout=60)
        assert rest.startswith("\n(stopped; ") and "> more\n" in rest and child.returncode == 0
        assert server.requests[-1]["messages"] == [{"role": "user", "content": "say more"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--prompt", "x"], "/nowhere"),
        ([str(GOLDEN_MODEL), "--prompt", "x"], "has neither model.safetensors"),
        (["MODEL", "--prompt", "x", "--image", "/no/such.png"], "/no/such.png does not exist"),
        (["MODEL", "--prompt", "x", "--video", str(PICTURE)], "r84x140.png"),
        (["MODEL", "--prompt", "<|image_pad|>"], "in its text"),
        (
            ["MODEL", "--prompt", "x", "--max_pixels", "10"],
            "max_pixels 10 is below min_pixels 3136",
        ),
        (["MODEL", "--prompt", "x", "--api_key", "k"], "--api_key is for an endpoint"),
        (["MODEL", "--prompt", "x", "--top_p", "0"], "top_p is 0.0"),
        (["MODEL", "--prompt", "x", "--temprature", "0"], "--temprature"),
        (["MODEL", "--input", "x.jsonl"], "--input and --output go together"),
        (["URL", "--prompt", "x", "--max_pixels", "10"], "a server has its own limits"),
        (["URL", "--prompt", "x", "--model_name", "other"], "`other` does not exist"),
        (["URL/v1", "--prompt", "x", "--api_key", "wrong"], "401: Unauthorized"),
        (["URL/elsewhere", "--prompt", "x"], "404: no route /elsewhere/v1/models"),
        (["URL", "--prompt", "fail 400"], "refuses it: 400: as asked for"),
        (["URL", "--prompt", "fail 422"], "refuses it: 422: as asked for"),
        (["URL", "--prompt", "x", "--system", ""], "empty system prompt"),
        (["URL", "--prompt", "break"], "in the middle of an answer"),
        (["URL", "--prompt", "hang", "--timeout", "0.3"], "silent for 0.3 s"),
        (["http://127.0.0.1:PORT", "--prompt", "x"], "is the server running?"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(folder, capsys, arguments, message):
    with serving() as server:
        names = {"MODEL": str(folder), "URL": server.url, "PORT": str(free_port())}
        for name, value in names.items():
            arguments = [a.replace(name, value) for a in arguments]
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_several_models_are_named_and_not_guessed():
    with serving(models=("one", "two")) as server:
        with pytest.raises(Exception, match=r"2 models \(one, two\)"):
            Endpoint(server.url).identity()
        assert Endpoint(server.url, model="two").identity()["model"] == "two"


def test_the_recipes_variables_bound_images_and_yield_to_flags(folder, monkeypatch, capsys):
    monkeypatch.setenv("MAX_PIXELS", "10")
    assert main([str(folder), "--prompt", "x"]) == 2
    assert "max_pixels 10 is below" in capsys.readouterr().err
    flags = ["--max_pixels", "4000", "--max_new_tokens", "1"]
    assert main([str(folder), "--prompt", "x", *flags]) == 0
    monkeypatch.setenv("MAX_PIXELS", "many")
    assert main([str(folder), "--prompt", "x"]) == 2
    assert "MAX_PIXELS='many' is not a number" in capsys.readouterr().err
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        Sampling(max_new_tokens=0)


def test_tools_are_sent_as_the_text_that_a_local_prompt_has():
    row = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "look"}]}
    sample = parse_row(row, "x", RowContext(None))
    system, user = request_messages(sample)
    assert system == {"role": "system", "content": system_text(sample)}
    assert '"name": "look"' in system["content"] and user["content"] == "hi"


def test_boxes_are_refused_by_name():
    row = {
        "messages": [{"role": "user", "content": "<image>what is at <bbox>?"}],
        "images": [str(IMAGES / "sq56.png")],
        "objects": {"bbox": [[1, 2, 3, 4]]},
    }
    with pytest.raises(BadSample, match="x: has boxes"):
        request_messages(parse_row(row, "x", RowContext(ROOT)))

"""One answer, a conversation, and what a person mistypes."""

import builtins

import pytest
import torch
from PIL import Image

from serve.chat import main
from tests.tiny import GOLDEN_MODEL, write_hybrid
from vlm.checkpoint import load_model
from vlm.data.collate import collate
from vlm.data.processor import Processor
from vlm.data.schema import Message, Sample
from vlm.generate import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_hybrid(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (60, 90), (200, 30, 40)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def expected(model, messages, images):
    processor = Processor.from_pretrained(model)
    network = load_model(model, torch.float32)
    batch = collate([processor.prompt(Sample("x", messages, images))], network.config)
    (ids,) = generate(network, batch, max_new_tokens=6, stop_ids=processor.stop_ids)
    return processor.decode(ids)


def test_one_answer_is_what_generation_gives(model, picture, capsys):
    arguments = [str(model), "--image", str(picture), "--prompt", "what?", "--max_new_tokens", "6"]
    assert main(arguments) == 0
    answer = expected(model, (Message("user", "<image>what?"),), (picture,))
    assert answer and capsys.readouterr().out == answer + "\n"


def test_conversation_remembers_its_turns_and_images(model, picture, capsys, monkeypatch):
    typed = iter([f"/image {picture}", "what?", "and?", "/nonsense", "/reset", "hello", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _prompt: next(typed))
    assert main([str(model), "--max_new_tokens", "6"]) == 0
    lines = capsys.readouterr().out.split("\n", 1)[1]
    first = expected(model, (Message("user", "<image>what?"),), (picture,))
    turns = (Message("user", "<image>what?"), Message("assistant", first), Message("user", "and?"))
    second = expected(model, turns, (picture,))
    fresh = expected(model, (Message("user", "hello"),), ())
    assert lines.startswith(f"{first}\n{second}\n/nonsense is no command")
    assert lines.endswith(f"{fresh}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--prompt", "x"], "/nowhere"),
        ([str(GOLDEN_MODEL), "--prompt", "x"], "has neither model.safetensors"),
        (["MODEL", "--prompt", "x", "--image", "/no/such.png"], "/no/such.png does not exist"),
        (["MODEL", "--prompt", "<|image_pad|>"], "in its text"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(model, capsys, arguments, message):
    arguments = [str(model) if a == "MODEL" else a for a in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1

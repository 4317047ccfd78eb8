"""Answers to held-out questions while training: what is asked, what the model says, and where it
is written."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from train.disk import write_lines
from vlm.data.chat import SPEAKERS
from vlm.data.collate import collate
from vlm.data.grounding import place_boxes
from vlm.data.processor import Example, Processor
from vlm.data.schema import Message, Sample
from vlm.data.view import pictures
from vlm.generate import generate
from vlm.model import VisionLanguageModel

THUMBNAIL = 320
"""Pixels on the longer side of the images beside an answer."""


class Question(NamedTuple):
    asked: Sample
    truth: str
    """What the data answers."""
    prompt: Example


def ask(sample: Sample, processor: Processor) -> Question:
    """Raises BadSample: media or boxes that cannot be used."""
    asked, truth = split_answer(sample, processor)
    return Question(asked, truth, processor.prompt(asked))


@torch.no_grad()
def answer(
    model: VisionLanguageModel,
    questions: Sequence[Question],
    processor: Processor,
    max_new_tokens: int,
) -> list[dict]:
    """What the model says to each, greedily, beside the question's words, images and truth."""
    if not questions:
        return []
    prompts = collate([question.prompt for question in questions], model.config)
    outputs = generate(
        model,
        prompts.to(model.head_weight.device),
        max_new_tokens=max_new_tokens,
        stop_ids=processor.stop_ids,
    )
    vision = processor.config.vision
    return [
        {
            "id": asked.id,
            "question": asked.messages[-1].content,
            "truth": truth,
            "answer": processor.decode(ids),
            "images": [_thumbnail(first) for first, *_ in pictures(prompt, vision)],
        }
        for (asked, truth, prompt), ids in zip(questions, outputs, strict=True)
    ]


def add_answers(path: Path, answers: Sequence[dict], step: int) -> None:
    """Add a step's answers to the file, in place of those that a killed run gave from there on and
    of lines that are none."""
    lines: list[str] = []
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if _is_before(line, step)]
    lines += [json.dumps(figures) for figures in answers]
    write_lines(path, lines)


def _is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False


def split_answer(sample: Sample, processor: Processor) -> tuple[Sample, str]:
    """The conversation up to the assistant's last words, and these words, boxes as they are learnt.

    Raises:
        BadSample: media or boxes that cannot be used.
    """
    media = processor.reader.measure(sample)
    placed = place_boxes(sample, media, processor.config.vision.patch_size)
    messages, truth = list(placed.messages), ""
    while messages and SPEAKERS.get(messages[-1].role) == "assistant":
        truth = messages.pop().content + truth
    if not messages or messages[-1].role == "system":
        messages.append(Message("user", ""))  # as training has it
    return replace(placed, messages=tuple(messages)), truth


def _thumbnail(frame: Tensor) -> str:
    """(height, width, 3) uint8 as a data URI."""
    image, file = Image.fromarray(frame.numpy()), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

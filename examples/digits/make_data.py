"""Conversations about the boards, in the files that training and scoring read.

python -m examples.digits.make_data --out DIR

Writes stage1.jsonl and stage2.jsonl (training scans only), held_out.jsonl (one question a line,
over scans that nothing trains on) and held_out_text.jsonl, the pictures under images/, and
scans.json: which of scikit-learn's scans are in the pictures of each file.

A quarter of the pictures are inverted, light ink on dark paper, which the vision donor never
saw: the first stage trains the merger alone and cannot teach it to the tower, the second can.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from examples.digits.boards import (
    Board,
    Question,
    Scans,
    ask_several,
    draw_board,
    load_scans,
    render,
)

STAGE1, STAGE2 = 4800, 12000
"""Samples of each stage's file."""
HELD_OUT_SAMPLES = 400
"""Each with four questions: 1,600 in all."""
QUESTIONS = 4
PICTURE_DIGITS, TEXT_DIGITS = 3, 4
"""Most digits on a board. The language donor's text and the stages' text boards are as wide as
each other: a stage that rehearses less than the donor learnt forgets the rest."""
INVERTED = 0.25


def conversation(opening: str, questions: Sequence[Question]) -> list[dict]:
    """Messages; the opening (a board, or its `<image>`) comes with the first question."""
    messages = []
    for number, question in enumerate(questions):
        asked = f"{opening}\n{question.text}" if number == 0 else question.text
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def draw_boards(rng: np.random.Generator, max_digits: int) -> list[Board]:
    """One board of 1 to `max_digits` digits or, one time in five, two of one less at most."""
    if rng.random() < 0.2:
        return [draw_board(rng, int(rng.integers(1, max_digits))) for _ in range(2)]
    return [draw_board(rng, int(rng.integers(1, max_digits + 1)))]


def text_sample(rng: np.random.Generator, questions: int) -> dict:
    """A sample without pictures: one or two boards as characters."""
    boards = draw_boards(rng, TEXT_DIGITS)
    lines = bool(rng.integers(2))
    opening = "\n\n".join(board.text(lines) for board in boards)
    asked = ask_several([d for board in boards for d in board.digits], questions, rng)
    return {"messages": conversation(opening, asked)}


class PictureWriter:
    """Samples with pictures, whose files it writes; remembers the scans that it used."""

    def __init__(self, folder: Path, name: str, scans: Scans, rng: np.random.Generator) -> None:
        self.folder, self.name, self.scans, self.rng = folder, name, scans, rng
        self.used: set[int] = set()
        self.count = 0
        (folder / "images" / name).mkdir(parents=True)

    def sample(self, questions: int) -> tuple[str, list[Question], list[str], bool]:
        """Opening, questions, image files, and whether one of them is inverted."""
        boards = draw_boards(self.rng, PICTURE_DIGITS)
        inverted = [bool(self.rng.random() < INVERTED) for _ in boards]
        files = [self._write(board, i) for board, i in zip(boards, inverted, strict=True)]
        asked = ask_several([d for board in boards for d in board.digits], questions, self.rng)
        return "<image>" * len(files), asked, files, any(inverted)

    def _write(self, board: Board, inverted: bool) -> str:
        pixels, numbers = render(board, self.scans, self.rng, inverted)
        self.used.update(numbers)
        file = f"images/{self.name}/{self.count:05d}.png"
        self.count += 1
        Image.fromarray(pixels).save(self.folder / file, compress_level=1)
        return file


def training_rows(
    pictures: PictureWriter, samples: int, text_share: float, rng: np.random.Generator
) -> Iterator[dict]:
    """Rows of a stage's file: several questions a sample, some samples of text alone."""
    for _ in range(samples):
        if rng.random() < text_share:
            yield text_sample(rng, QUESTIONS)
        else:
            opening, asked, files, _ = pictures.sample(QUESTIONS)
            yield {"messages": conversation(opening, asked), "images": files}


def held_out_rows(pictures: PictureWriter, samples: int) -> Iterator[dict]:
    """One row per question, with its kind, for scoring; the picture's file is shared."""
    for _ in range(samples):
        opening, asked, files, inverted = pictures.sample(QUESTIONS)
        for question in asked:
            messages = conversation(opening, [question])
            yield {
                "messages": messages,
                "images": files,
                "kind": question.kind,
                "inverted": inverted,
            }


def make_data(
    out: Path, stage1: int = STAGE1, stage2: int = STAGE2, held_out: int = HELD_OUT_SAMPLES
) -> None:
    """Write everything into `out`, which appears whole or not at all. Same call, same bytes."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    training, unseen = load_scans()
    used = {}
    plans = [("stage1", training, stage1, 0.1), ("stage2", training, stage2, 0.3)]
    for seed, (name, scans, samples, text_share) in enumerate([*plans, ("held_out", unseen, 0, 0)]):
        rng = np.random.default_rng([17, seed])
        pictures = PictureWriter(partial, name, scans, rng)
        if name == "held_out":
            rows = held_out_rows(pictures, held_out)
        else:
            rows = training_rows(pictures, samples, text_share, rng)
        _write_rows(partial / f"{name}.jsonl", rows)
        used[name] = sorted(pictures.used)
    rng = np.random.default_rng([17, 3])
    _write_rows(partial / "held_out_text.jsonl", (text_sample(rng, 5) for _ in range(held_out)))
    (partial / "scans.json").write_text(json.dumps(used))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _write_rows(path: Path, rows: Iterator[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    out = parser.parse_args().out
    make_data(out)
    counts = {path.stem: len(path.read_text().splitlines()) for path in out.glob("*.jsonl")}
    print(f"wrote {out}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))


if __name__ == "__main__":
    main()

"""Tables in VLMEvalKit's layout: one TSV per dataset, pictures as base64."""

import base64
import csv
import io
from pathlib import Path

from PIL import Image


def picture(shade: int) -> str:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, 0, 0)).save(data, "JPEG")
    return base64.b64encode(data.getvalue()).decode()


def write_table(folder: Path, name: str, rows: list[dict]) -> Path:
    """`folder`/`name`.tsv; a row without an image gets one of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": picture(37 * n), **row} for n, row in enumerate(rows)]
    with (folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return folder / f"{name}.tsv"


COLOURS = {"A": "red", "B": "green", "C": "blue", "D": "black"}


def mmmu(folder: Path) -> None:
    """Seven multiple-choice questions and an open one; 1 and 2 are of the split dev."""
    rows = [
        {
            "index": n,
            "question": f"<image 1> What is no. {n}?",
            **COLOURS,
            "answer": "ABCDABC"[n - 1],
            "category": "Art" if n <= 4 else "Math",
            "split": "dev" if n <= 2 else "validation",
        }
        for n in range(1, 8)
    ]
    opened = {"index": 8, "question": "<image 1> How many no. 8?", "answer": "42"}
    write_table(
        folder, "MMMU_DEV_VAL", [*rows, {**opened, "category": "Math", "split": "validation"}]
    )


def mmbench(folder: Path) -> None:
    """Two questions, each asked in two orders of its options, as MMBench does it."""
    rows = []
    for index, right in ((1, "cat"), (2, "dog")):
        for turn in (0, 1):
            options = ("cat", "dog") if turn == 0 else ("dog", "cat")
            rows.append(
                {
                    "index": index + turn * 1_000_000,
                    "question": f"Which animal is no. {index}?",
                    "A": options[0],
                    "B": options[1],
                    "answer": "AB"[options.index(right)],
                    "category": "identity_reasoning",
                    "l2-category": "attribute_reasoning",
                    "split": "dev",
                }
            )
    write_table(folder, "MMBench_DEV_EN", rows)


def questions(folder: Path, name: str, rows: list[tuple]) -> None:
    """(answer, further columns) per row, asked as `no. N?`."""
    asked = [
        {"index": n, "question": f"What is no. {n}?", "answer": answer, **further}
        for n, (answer, further) in enumerate(rows, 1)
    ]
    write_table(folder, name, asked)

"""Data of benchmark families in the layout that each is published in, tiny and made up.

Question N of a family holds the words `no. N?`, by which tests/eval/known_endpoint.py knows it.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

OPTIONS = ["red", "green", "blue", "black"]


def png(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, 99, 0)).save(data, "PNG")
    return data.getvalue()


def _picture(number: int) -> dict:
    return {"bytes": png(37 * number), "path": None}


def _parquet(path: Path, rows: Sequence[dict], images: Sequence[str] = ("image",)) -> None:
    """As the hub's own are written: pictures are of the feature type Image."""
    from datasets import Dataset
    from datasets import Image as Picture

    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(list(rows))
    for name in images:
        table = table.cast_column(name, Picture())
    table.to_parquet(path)


def _readme(folder: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    """`README.md` whose head names the files of every config: name -> {split: path}."""
    listed = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": path} for split, path in files.items()],
        }
        for name, files in configs.items()
    ]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\n")


def mmmu(root: Path) -> Path:
    """Art: choices 1 to 4 of gold A to D. Math: choices 5 to 7 of gold A to C, open 8 and 9."""
    folder = root / "mmmu"

    def row(number: int, **changes) -> dict:
        return {
            "id": f"validation_{number}",
            "question": f"<image 1> What is no. {number}?",
            "options": str(OPTIONS),
            "explanation": "",
            "image_1": _picture(number),
            "image_2": _picture(number + 100) if number == 2 else None,
            "img_type": "['Paintings']",
            "answer": "ABCDABC"[(number - 1) % 7],
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice",
            "subfield": "Any",
        } | changes

    opened = {"question_type": "open", "options": "[]"}
    math = [row(n) for n in (5, 6, 7)]
    math += [row(8, answer="42", **opened), row(9, answer="['1/2', '0.5']", **opened)]
    files = {}
    for subject, rows in (("Art", [row(n) for n in (1, 2, 3, 4)]), ("Math", math)):
        _parquet(
            folder / subject / "validation-00000-of-00001.parquet", rows, ("image_1", "image_2")
        )
        files[subject] = {"validation": f"{subject}/validation-*"}
    _readme(folder, files)
    return folder


def chartqa(root: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """(type, gold) per question."""
    table = [
        {
            "type": kind,
            "question": f"What is no. {number}?",
            "answer": gold,
            "image": _picture(number),
        }
        for number, (kind, gold) in enumerate(rows, 1)
    ]
    _parquet(root / "chartqa" / "data" / "test-00000-of-00001.parquet", table)
    return root / "chartqa"


def docvqa(root: Path, golds: Sequence[Sequence[str]]) -> Path:
    """Accepted answers per question."""
    table = [
        {
            "questionId": str(number),
            "question": f"What is no. {number}?",
            "question_types": ["layout"],
            "image": _picture(number),
            "docId": number,
            "ucsf_document_id": "x",
            "ucsf_document_page_no": "1",
            "answers": list(accepted),
            "data_split": "val",
        }
        for number, accepted in enumerate(golds, 1)
    ]
    folder = root / "docvqa"
    _parquet(folder / "DocVQA" / "validation-00000-of-00001.parquet", table)
    _readme(folder, {"DocVQA": {"validation": "DocVQA/validation-*"}})
    return folder


def pope(root: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """(split, yes or no) per question; all three splits must be there."""
    folder, files = root / "pope", {}
    for split in ("adversarial", "popular", "random"):
        table = [
            {
                "id": str(number),
                "question_id": str(number),
                "question": f"Is there a no. {number}?",
                "answer": gold,
                "image_source": "x",
                "image": _picture(number),
                "category": split,
            }
            for number, (kind, gold) in enumerate(rows, 1)
            if kind == split
        ]
        _parquet(folder / "Full" / f"{split}-00000-of-00001.parquet", table)
        files[split] = f"Full/{split}-*"
    _readme(folder, {"Full": files})
    return folder


def hallusion_bench(root: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """(figure, yes or no) per question."""
    table = [
        {
            "category": "VD",
            "subcategory": "chart",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": figure,
            "sample_note": "",
            "question_id": str(number),
            "question": f"Is this no. {number}?",
            "gt_answer_details": "",
            "gt_answer": "1" if gold == "yes" else "0",
            "filename": "x",
            "image": _picture(number),
        }
        for number, (figure, gold) in enumerate(rows, 1)
    ]
    folder = root / "hallusion_bench"
    _parquet(folder / "data" / "image-00000-of-00001.parquet", table)
    return folder


def general_vmcq(root: Path, golds: str, subset: str = "mine") -> Path:
    """One gold letter per question; options, without letters, are OPTIONS."""
    folder = root / "general_vmcq"
    folder.mkdir(parents=True)
    rows = []
    for number, gold in enumerate(golds, 1):
        picture = folder / f"{number}.png"
        picture.write_bytes(png(number))
        question = f"<image 1> What is no. {number}?"
        rows.append(
            {"question": question, "options": OPTIONS, "image_1": str(picture), "answer": gold}
        )
    (folder / f"{subset}_val.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def video(path: Path, shade: int) -> Path:
    """Eight frames of 48 x 32."""
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8, (48, 32))
    assert writer.isOpened()
    for frame in range(8):
        writer.write(np.full((32, 48, 3), (shade + 20 * frame) % 256, np.uint8))
    writer.release()
    return path


def mvbench(root: Path, golds: Sequence[str]) -> Path:
    """Task action_antonym: one of OPTIONS per question, each about a video of its own."""
    folder = root / "mvbench"
    (folder / "json").mkdir(parents=True)
    (folder / "video").mkdir()
    rows = []
    with zipfile.ZipFile(folder / "video" / "ssv2_video.zip", "w") as archive:
        for number, gold in enumerate(golds, 1):
            name = f"{number}.mp4"
            archive.write(video(folder / name, 50 * number), f"ssv2_video/{name}")
            (folder / name).unlink()
            question = f"What happens in no. {number}?"
            rows.append(
                {"video": name, "question": question, "candidates": OPTIONS, "answer": gold}
            )
    (folder / "json" / "action_antonym.json").write_text(json.dumps(rows))
    _readme(folder, {"action_antonym": {"train": "json/action_antonym.json"}})
    return folder


def own(file: Path, rows: Sequence[tuple], **further: object) -> Path:
    """The training format: (question, gold) per row, each with a picture of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (question, gold) in enumerate(rows, 1):
        picture = file.parent / f"{file.stem}_{number}.png"
        picture.write_bytes(png(number))
        asked = {"role": "user", "content": f"<image>{question}"}
        answer = {"role": "assistant", "content": gold}
        lines.append({"messages": [asked, answer], "images": [picture.name], **further})
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def mathvista(root: Path, golds: Sequence[str]) -> Path:
    """Open questions with a number for an answer."""
    table = [
        {
            "pid": str(number),
            "question": f"What is no. {number}?",
            "decoded_image": _picture(number),
            "choices": None,
            "unit": None,
            "precision": 0.0,
            "answer": gold,
            "question_type": "free_form",
            "answer_type": "integer",
            "metadata": {"task": "figure question answering"},
            "query": "",
        }
        for number, gold in enumerate(golds, 1)
    ]
    folder = root / "mathvista"
    _parquet(folder / "data" / "testmini-00000-of-00001.parquet", table, ("decoded_image",))
    return folder

"""Small data files for these tests: text, images and the processor of the golden model."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.index import Index, build_index
from vlm.data.ledger import Entry
from vlm.data.limits import Limits
from vlm.data.processor import Processor
from vlm.data.schema import Sample
from vlm.data.sources import open_sources

GOLDEN = Path(__file__).parents[1] / "golden"


def processor(max_length=None, truncation="delete", think="keep", **limits) -> Processor:
    options = {"max_length": max_length, "truncation": truncation, "think": think}
    return Processor.from_pretrained(GOLDEN / "model", Limits(**limits), **options)


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **keys) -> dict:
    return {"role": "assistant", "content": content, **keys}


def row(question="hi", answer="ok", images=(), **keys) -> dict:
    return {"messages": [user(question), assistant(answer)], "images": list(images), **keys}


def sample(*messages, images=(), folder=GOLDEN, name="data.jsonl:1") -> Sample:
    return parse_row({"messages": list(messages), "images": list(images)}, name, RowContext(folder))


def write_jsonl(path: Path, rows) -> Path:
    """Rows are objects, or the bytes of a line."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def index_of(files: Sequence[Path], ours: Processor, **options) -> tuple[Index, list[Entry]]:
    """The index of some files, and their bad samples."""
    return build_index(open_sources([str(file) for file in files]), ours, **options)


def write_image(path: Path, height: int, width: int, seed: int = 0) -> str:
    """A noisy picture; returns its name."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path.name


def damage(path: Path) -> str:
    """Cut a file in half, which leaves an image's header whole; returns its name."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path.name

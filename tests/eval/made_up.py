"""Results that no model gave, for the scripts that read results."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from eval.result import Result, SampleResult, write_result

PROTOCOL = {"temperature": 0.0, "limit": None, "generation": {"max_tokens": 512}}


def sample(number: int, score: float | None, **fields) -> SampleResult:
    """Sample `number`; a score of None is a failed one."""
    about = {
        "id": f"s{number}",
        "subset": "default",
        "question": f"Question {number}?",
        "gold": f"gold {number}",
        "raw": "" if score is None else f"ANSWER: given {number}",
        "extracted": None if score is None else f"given {number}",
        "score": score,
        "error": "HTTP 500" if score is None else None,
    }
    return SampleResult(**about | fields)


def write(
    root: Path,
    checkpoint: str,
    benchmark: str,
    scores: Sequence[float | None] = (),
    samples: Sequence[SampleResult] | None = None,
    folder: str | None = None,
    **fields,
) -> Path:
    """A result in `folder` of `root`; its score is the samples' mean if all of them have one."""
    rows = list(samples or [sample(k, score) for k, score in enumerate(scores)])
    given = [row.score for row in rows if row.score is not None]
    about = {
        "benchmark": benchmark,
        "checkpoint": checkpoint,
        "backend": "native",
        "backend_version": "1.14.1",
        "metric": "accuracy",
        "score": 100 * sum(given) / len(given) if len(given) == len(rows) else None,
        "n": len(rows),
        "errored": len(rows) - len(given),
        "missing": 0,
        "unparsed": 0.0,
        "truncated": 0.0,
        "subsets": {},
        "protocol": PROTOCOL,
        "data_hash": "d0d0d0d0d0d0d0d0",
        "seconds": 1.0,
    }
    place = root / (folder or f"{checkpoint}/{benchmark}")
    write_result(place, Result(**about | fields), rows)
    return place


def image_bytes(size=(20, 12), kind="PNG", mode="RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 3).save(out, kind)
    return out.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

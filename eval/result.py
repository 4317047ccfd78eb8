"""What a benchmark leaves behind: `result.json` and `samples.jsonl`, and nothing that is not whole.

    RESULTS/CHECKPOINT/BENCHMARK/
      result.json      the score with all that it rests on
      samples.jsonl    one line per sample: what was asked, answered, read out of it, and scored
      backend/         the library's own files

A score is given only where every sample was asked and scored (`complete`).
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

MAX_PATH = 4096
RESULT, SAMPLES = "result.json", "samples.jsonl"


class EvalError(RuntimeError):
    """A benchmark that cannot be run, or did not end well; the message says what to do."""


@dataclass(frozen=True)
class SampleResult:
    """One question and what became of it."""

    id: str
    """The same for every checkpoint."""
    subset: str
    question: str
    gold: str
    raw: str
    """The model's answer as it came, thoughts included; empty where there is none."""
    extracted: str | None
    """What the library read out of it; None where it found nothing."""
    score: float | None
    """0..1; None where there is none."""
    truncated: bool = False
    """The answer ended at max_tokens."""
    error: str | None = None
    """Why there is no answer."""
    images: tuple[str, ...] = ()
    """Data URIs, or paths that are absolute or relative to the working directory of the run."""
    videos: tuple[str, ...] = ()
    """The same."""


@dataclass(frozen=True)
class Result:
    """A benchmark's score of a checkpoint, with its evidence."""

    benchmark: str
    checkpoint: str
    backend: str
    """`native` or `vlmevalkit`."""
    backend_version: str
    metric: str
    score: float | None
    """0..100; None unless `complete`."""
    n: int
    """Samples that were to be scored."""
    errored: int
    """Asked, and no answer came."""
    missing: int
    """Neither answered nor recorded as failed."""
    unparsed: float
    """Share of the answers out of which nothing could be read, 0..1."""
    truncated: float
    """Share of the answers that ended at max_tokens, 0..1."""
    subsets: dict[str, dict]
    """Name -> {"score": 0..100, "n": samples}."""
    protocol: dict
    """Prompt, generation config, thinking, judge, limit, subsets: what makes scores comparable."""
    data_hash: str
    """Of what was asked: questions, answers, pictures and videos."""
    seconds: float
    model: str = ""
    """As the endpoint calls it."""
    weights: str = ""
    """Fingerprint of the export that was served; empty for an endpoint of which nobody knows."""
    size: int | None = None
    """Samples that the benchmark has; None where its YAML does not know."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the score should know."""

    @property
    def complete(self) -> bool:
        return self.n > 0 and not self.errored and not self.missing


def data_hash(samples: Iterable[SampleResult]) -> str:
    """Of all that was asked, whatever became of it; equal for equal data."""
    digest = sha256()
    for sample in sorted(samples, key=lambda sample: sample.id):
        digest.update(json.dumps([sample.id, sample.question, sample.gold]).encode())
        for media in (*sample.images, *sample.videos):
            path = Path(media) if len(media) < MAX_PATH and not media.startswith("data:") else None
            digest.update(path.read_bytes() if path and path.is_file() else media.encode())
    return digest.hexdigest()[:16]


def write_result(folder: Path, result: Result, samples: Iterable[SampleResult]) -> None:
    """Both files, whole or as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(sample)) for sample in samples]  # ASCII: whatever was answered
    _replace(folder / SAMPLES, "".join(f"{line}\n" for line in lines))
    content = asdict(result) | {"complete": result.complete}
    _replace(folder / RESULT, json.dumps(content, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_result(folder: Path) -> tuple[Result, list[SampleResult]]:
    """EvalError names a file that is missing or damaged."""
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        content.pop("complete")
        lines = (folder / SAMPLES).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        samples = [_sample(row) for row in rows]
        result = Result(**content)
        scores = [result.score, *(sample.score for sample in samples)]
        if not all(isinstance(score, int | float | None) for score in scores):
            raise ValueError("a score is no number")
        return result, samples
    except FileNotFoundError as error:
        raise EvalError(f"{error.filename} does not exist; run the benchmark first") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvalError(f"{folder} holds no result that can be read ({error})") from None


def _sample(row: dict) -> SampleResult:
    media = {name: tuple(row.get(name, ())) for name in ("images", "videos")}
    return SampleResult(**row | media)


def find_results(folders: Iterable[Path]) -> list[Path]:
    """Every folder with a `result.json` at or below the given ones, in order."""
    return [path.parent for folder in folders for path in sorted(Path(folder).rglob(RESULT))]

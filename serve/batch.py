"""Many conversations answered at once: JSONL in, JSONL out, and the same command resumes.

A line of the input is a row of our data format. If it ends with the assistant's words, those are
kept from the model and come back as `label`. A line of the output is one of

    {"id": "data.jsonl:3", "response": "A cat.", "label": "A cat.", "finish_reason": "stop"}
    {"id": "data.jsonl:4", "error": "/data/cat.jpg does not exist"}

in the order of answering; there is never more than one for a row. Beside the output lies
`NAME.settings.json`: what it was made from, so that other answers are never mixed in.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from serve.conversation import Answer, Backend, Sampling
from serve.usage import UsageError
from vlm.data.formats import parse_line
from vlm.data.formats.context import RowContext
from vlm.data.schema import BadSample, Sample, check_sample


def run_batch(
    backend: Backend, sampling: Sampling, source: Path, output: Path, batch_size: int
) -> int:
    """Answer all rows of `source` that `output` has no answer to; how many failed.

    Raises:
        UsageError: files that cannot be used, or an output that belongs to other settings.
    """
    rows, digest = _survey(source)
    settings = {"input_sha256": digest, **backend.identity(), **asdict(sampling)}
    answered = _resume(output, settings)
    labels, bad = {}, []

    def todo() -> Iterator[Sample]:
        for sample_id, line in _lines(source):
            if sample_id in answered:
                continue
            try:
                conversation, label = split_label(
                    parse_line(line, sample_id, RowContext(source.parent))
                )
            except BadSample as error:
                bad.append(error)
                continue
            labels[sample_id] = label
            yield conversation

    failed = 0
    with (
        open(output, "a", encoding="utf-8") as file,
        tqdm(total=rows, initial=len(answered), unit="row", disable=None) as progress,
    ):

        def record(sample_id: str, outcome: Answer | BadSample) -> None:
            label = labels.pop(sample_id, None)
            if isinstance(outcome, BadSample):
                row = {"id": sample_id, "error": outcome.reason}
            else:
                row = {"id": sample_id, "response": outcome.text}
                row |= {} if label is None else {"label": label}
                row |= {"finish_reason": outcome.finish}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress.update()

        for sample_id, outcome in backend.ask_many(todo(), sampling, batch_size):
            record(sample_id, outcome)
            failed += isinstance(outcome, BadSample)
        for error in bad:
            record(error.sample_id, error)
    return failed + len(bad)


def split_label(sample: Sample) -> tuple[Sample, str | None]:
    """The conversation up to its last question, and the answer that the data gives to it."""
    if sample.messages[-1].role != "assistant":
        return sample, None
    shorter = replace(sample, messages=sample.messages[:-1])
    return check_sample(shorter), sample.messages[-1].content


def _lines(source: Path) -> Iterator[tuple[str, bytes]]:
    """(id, line) of every row; blank lines are none."""
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{source.name}:{number}", line


def _survey(source: Path) -> tuple[int, str]:
    """Number of rows and SHA-256 of the input."""
    digest, rows = hashlib.sha256(), 0
    try:
        with open(source, "rb") as file:
            for line in file:
                digest.update(line)
                rows += bool(line.strip())
    except OSError as error:
        raise UsageError(f"--input {source} cannot be read ({error.strerror})") from None
    return rows, digest.hexdigest()


def _resume(output: Path, settings: dict) -> set[str]:
    """Ids that are answered. What is torn or failed is taken out of the output, to come anew."""
    sidecar = output.with_name(f"{output.name}.settings.json")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not output.exists():
            sidecar.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            output.touch()
            return set()
        if not sidecar.exists():
            raise UsageError(f"--output {output} exists and has no {sidecar.name}; name another")
        theirs = json.loads(sidecar.read_text(encoding="utf-8"))
        lines = output.read_bytes().splitlines(keepends=True)
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"--output {output} cannot be used ({error})") from None
    for key in settings | theirs:
        if theirs.get(key) != settings.get(key):
            raise UsageError(
                f"--output {output} was made with {key} {theirs.get(key)!r}, not "
                f"{settings.get(key)!r}; name another output"
            )
    answered, kept = set(), []
    for line in lines:
        row = _whole(line)
        if row and "response" in row:
            answered.add(row["id"])
            kept.append(line)
    if len(kept) < len(lines):
        partial = output.with_name(f"{output.name}.partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, output)
    return answered


def _whole(line: bytes) -> dict | None:
    """The line's object; None for the last line of a run that was killed while writing it."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None

"""Answers a checkpoint gives to the held-out questions, by batched greedy generation.

python -m examples.digits.score --model DIR --data DIR --out FILE.json

An answer counts where it equals the truth, character by character.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from examples.digits.donors import text_batch
from vlm.checkpoint import load_language_model, load_model
from vlm.data.collate import collate
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.processor import Processor
from vlm.data.schema import Message, Sample
from vlm.generate import generate
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel, packed_attention

BATCH = 100
MAX_NEW_TOKENS = 16
"""The longest answer takes eight."""


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_samples(rows: Sequence[dict], path: Path) -> list[Sample]:
    return [
        parse_row(row, f"{path}:{n}", RowContext(path.parent))
        for n, row in enumerate(rows, start=1)
    ]


def answer_all(
    model: VisionLanguageModel, processor: Processor, samples: Sequence[Sample]
) -> list[str]:
    """The model's own last message of every sample, given the messages before it."""
    answers = []
    for start in range(0, len(samples), BATCH):
        prompts = [processor.prompt(without_answer(s)) for s in samples[start : start + BATCH]]
        outputs = generate(
            model,
            collate(prompts, model.config),
            max_new_tokens=MAX_NEW_TOKENS,
            stop_ids=processor.stop_ids,
        )
        answers += [processor.decode(ids) for ids in outputs]
    return answers


def without_answer(sample: Sample) -> Sample:
    messages: tuple[Message, ...] = sample.messages[:-1]
    return Sample(sample.id, messages, sample.images)


@torch.inference_mode()
def mean_loss(model: VisionLanguageModel, processor: Processor, samples: Sequence[Sample]) -> float:
    """Cross entropy per target token, over all samples."""
    total, targets = 0.0, 0
    for start in range(0, len(samples), BATCH):
        examples = [processor.encode(sample) for sample in samples[start : start + BATCH]]
        batch = collate(examples, model.config)
        total += cross_entropy_sum(model(batch), model.head_weight, batch.targets).item()
        targets += len(batch.targets)
    return total / targets


@torch.inference_mode()
def language_model_loss(model_dir: Path, rows: Sequence[dict]) -> float:
    """The same on text, of a language model by itself (the donor)."""
    model = load_language_model(model_dir)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    ids, segments, targets_at, targets = text_batch(
        rows, lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    )
    hidden = model(ids, segments, targets_at)
    return cross_entropy_sum(hidden, model.head_weight, targets).item() / len(targets)


@torch.inference_mode()
def top1_agreement(model_dir: Path, llm_dir: Path, rows: Sequence[dict]) -> float:
    """Percent of the places of all texts where a hybrid's most likely next token is its donor's."""
    hybrid, donor = load_model(model_dir), load_language_model(llm_dir)
    tokenizer = Tokenizer.from_file(str(llm_dir / "tokenizer.json"))
    ids, segments, _, _ = text_batch(
        rows, lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    )
    places = torch.arange(len(ids))
    positions = torch.cat([torch.arange(length) for length in segments.lengths]).expand(3, -1)
    decoder = hybrid.language_model
    hidden = decoder(decoder.embed_tokens(ids), positions, packed_attention(segments))
    ours = F.linear(decoder.norm(hidden), hybrid.head_weight).argmax(-1)
    theirs = F.linear(donor(ids, segments, places), donor.head_weight).argmax(-1)
    return 100 * (ours == theirs).float().mean().item()


def chance(rows: Sequence[dict]) -> float:
    """Exact match, in percent, of always giving a question kind's most frequent answer."""
    by_kind: dict[str, Counter] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], Counter())[row["messages"][-1]["content"]] += 1
    return 100 * sum(max(counts.values()) for counts in by_kind.values()) / len(rows)


def exact_match(rows: Sequence[dict], answers: Sequence[str]) -> float:
    """Percent of the answers that are right."""
    truths = [row["messages"][-1]["content"] for row in rows]
    return 100 * sum(a == t for a, t in zip(answers, truths, strict=True)) / len(rows)


def score(model_dir: Path, data: Path) -> dict:
    """Exact match in all, by kind of question and by ink; losses; every answer."""
    model, processor = load_model(model_dir).eval(), Processor.from_pretrained(model_dir)
    rows = read_rows(data / "held_out.jsonl")
    samples = as_samples(rows, data / "held_out.jsonl")
    text = as_samples(read_rows(data / "held_out_text.jsonl"), data / "held_out_text.jsonl")
    answers = answer_all(model, processor, samples)

    def match_where(key: str) -> dict[str, float]:
        values = sorted({str(row[key]) for row in rows})
        parts = {v: [i for i, row in enumerate(rows) if str(row[key]) == v] for v in values}
        return {
            value: exact_match([rows[i] for i in part], [answers[i] for i in part])
            for value, part in parts.items()
        }

    return {
        "exact_match": exact_match(rows, answers),
        "by_kind": match_where("kind"),
        "by_inverted": match_where("inverted"),
        "loss": mean_loss(model, processor, samples),
        "text_loss": mean_loss(model, processor, text),
        "answers": answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a hybrid's directory")
    parser.add_argument("--data", type=Path, required=True, help="make_data.py's directory")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    result = score(options.model, options.data)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.model}: {result['exact_match']:.1f} % of {len(result['answers'])} questions")


if __name__ == "__main__":
    main()

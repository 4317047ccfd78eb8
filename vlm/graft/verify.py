"""The proof: on text alone the hybrid is the language donor, and its tower the vision donor's.

Each of these a careless graft fails:
1. every tensor taken from a donor equals the donor's, bit for bit, and with both donors at hand
   every fresh one what the report's options and seed give; none holds infinities or nan;
2. the hybrid, through its M-RoPE, against our decoder on the donor's own files with plain
   rope, which shares no rope code with M-RoPE: the logits' difference must be exactly 0;
3. the same against transformers' own Qwen3 on the donor's files, an independent witness: at
   most 1e-5 of the largest logit in float32, since its kernels sum in another order;
4. with `--vision`, what the merger reads: against our tower on the donor's files (0) and
   against transformers' (1e-5 of the largest feature).

It is for a graft as it was built; training changes it. All goes layer by layer (`proof_text.py`,
`proof_vision.py`): an 8B model is proved in a few gigabytes.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vlm.checkpoint import write_json
from vlm.config import TextConfig, VLMConfig
from vlm.graft.proof_fresh import asked_dtype, compare_made, not_finite, read_report
from vlm.graft.proof_tensors import (
    Difference,
    DonorTensors,
    compare_dtypes,
    compare_settings,
    compare_tensors,
    describe_differences,
    dtype_notes,
    lost,
    nonzero_biases,
    open_checked,
    rounded,
    text_pairs,
)
from vlm.graft.proof_text import TextFigures, compare_texts
from vlm.graft.proof_tokenizer import MAX_TOKENS, TEXTS, compare_tokenizer, encode, read_texts
from vlm.graft.proof_vision import VisionFigures, verify_tower
from vlm.graft.tokenizer import choose_tokenizer
from vlm.hf_config import (
    TEXT_TYPES,
    ConfigError,
    parse_text_config,
    read_config,
    read_json,
)
from vlm.hub import add_hub_argument, resolve_model
from vlm.model import LanguageModel, VisionLanguageModel

WITNESS_TOLERANCE = 1e-5
LINES = 20
"""Differences that are printed; the JSON file has all."""
TEXT_WIDTH = ("hidden_size",)
TEXT_SETTINGS = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
)
"""Settings that the hybrid has from its donor. Without the same width they cannot run side by
side; a hybrid of fewer layers, or without QK-norm, can."""
NOT_LOOKED_AT = (
    "without --vision the tower, the merger, new rows of the embedding and the ids of media tokens "
    "were not compared with anything; of their values only infinities and nan would be found"
)


@dataclass(frozen=True)
class Proof:
    """What `verify` found."""

    text: TextFigures
    vision: VisionFigures | None
    differences: list[Difference]
    lost: list[str]
    """In words, what of the language donor the hybrid does without."""
    notes: list[str]
    """What was compared, where that is not plain, and what was not."""
    rounded: list[str]
    """The dtype to which the language and the vision donor's values were rounded, or empty."""

    @property
    def holds(self) -> bool:
        figures = [self.text] if self.vision is None else [self.text, self.vision]
        return (
            not self.differences
            and not self.lost
            and all(one.max_abs_delta == 0.0 for one in figures)
            and all(one.witness_max_abs_delta <= WITNESS_TOLERANCE for one in figures)
            and self.text.top1_agreement == 1.0
        )

    def as_json(self) -> dict:
        """All figures; the texts' on the top level. What is not a finite number is null."""
        found = asdict(self)
        content = found.pop("text") | {"first_divergence": first_divergence(self.text)} | found
        if self.vision is not None:
            content["vision"] |= {"first_divergence": first_divergence(self.vision)}
        return _finite(content | {"holds": self.holds})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the hybrid: directory or hub id")
    parser.add_argument("--llm", required=True, help="its language donor: directory or hub id")
    parser.add_argument("--vision", help="its vision donor, to prove the tower as well")
    add_hub_argument(parser)
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help=f"one text a line, {MAX_TOKENS} tokens in all; default: a few built-in ones",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def run(options: argparse.Namespace) -> int:
    """The command: 0 if the proof holds, 1 if not.

    Raises:
        ConfigError, CheckpointError: bad input.
    """
    texts = read_texts(options.texts) if options.texts else TEXTS
    named = (options.model, options.llm, *([options.vision] if options.vision else []))
    proof = verify(*(resolve_model(name, options.hub) for name in named), texts=texts)
    print_proof(proof)
    if options.json:
        try:
            write_json(options.json, proof.as_json())
        except OSError as error:
            raise ConfigError(f"{options.json} cannot be written: {error.strerror}") from None
    return 0 if proof.holds else 1


@torch.inference_mode()
def verify(
    model_dir: Path | str,
    llm_dir: Path | str,
    vision_dir: Path | str | None = None,
    texts: Sequence[str] = TEXTS,
) -> Proof:
    """Compare a hybrid with its donors.

    Raises:
        ConfigError, CheckpointError: a directory that cannot be read or is no such model,
            donors of other sizes, or texts that are too long.
    """
    model_dir, llm_dir = Path(model_dir), Path(llm_dir)
    config, told = read_config(model_dir), read_report(model_dir)
    hybrid = open_checked(model_dir, VisionLanguageModel, config, config.text.tie_word_embeddings)
    llm_raw, llm = read_llm(llm_dir, model_dir, config)
    held = open_checked(llm_dir, LanguageModel, llm, llm.tie_word_embeddings)
    donor, asked = DonorTensors(held, hybrid), asked_dtype(told and told.options)
    ids = encode(texts, llm_dir, llm.vocab_size, config)
    differences = compare_settings(config.text, llm, TEXT_SETTINGS)
    pairs = text_pairs(config.text, hybrid, llm, donor)
    differences += compare_tensors(pairs, hybrid, donor)
    differences += compare_dtypes(pairs, hybrid, donor, asked)
    differences += nonzero_biases(hybrid)
    theirs = [name for _, name in pairs]
    notes, roundings = dtype_notes(donor, "language", theirs), [rounded(donor, theirs)]
    vision, tokenizer_dir, more = None, llm_dir, False
    if vision_dir is None:
        notes.append(NOT_LOOKED_AT)
        more = told is not None and told.tokenizer == "vision"
        if more:
            notes.append(
                "the tokenizer is the vision donor's: the language donor's part is compared"
            )
    else:
        tower = verify_tower(config, hybrid, Path(vision_dir), llm.head_dim, asked)
        vision = tower.figures
        choice = choose_tokenizer(Path(vision_dir), llm_dir)
        tokenizer_dir, rows = choice.folder, max(llm.vocab_size, choice.size)
        made = compare_made(told, hybrid, tower.donor, held, rows)
        for part in (tower, made):
            differences, notes = differences + part.differences, notes + part.notes
        roundings.append(tower.rounded)
    differences += compare_tokenizer(texts, model_dir, tokenizer_dir, config, more)
    named = {difference.name for difference in differences}
    differences += [one for one in not_finite(hybrid) if one.name not in named]
    return Proof(
        text=compare_texts(ids, config, hybrid, llm, donor, llm_raw),
        vision=vision,
        differences=differences,
        lost=lost(config.text, llm),
        notes=notes,
        rounded=roundings,
    )


def read_llm(llm_dir: Path, model_dir: Path, config: VLMConfig) -> tuple[dict, TextConfig]:
    """The language donor's config, raw and parsed, if it can be that of the hybrid."""
    path = llm_dir / "config.json"
    raw = read_json(path)
    if raw.get("model_type") not in TEXT_TYPES:
        raise ConfigError(
            f"{path} is of model_type {raw.get('model_type')!r}; --llm takes the dense Qwen3 that "
            "the hybrid was grafted from"
        )
    llm = parse_text_config(raw, path)
    wrong = compare_settings(config.text, llm, TEXT_WIDTH)
    if config.text.vocab_size < llm.vocab_size:
        wrong += compare_settings(config.text, llm, ["vocab_size"])
    if wrong:
        raise ConfigError(f"{llm_dir} is not the language donor of {model_dir}: {wrong[0].how}")
    return raw, llm


def first_divergence(figures: TextFigures | VisionFigures) -> str | None:
    """The first step after which the hybrid is not its donor; None where it is throughout."""
    for stage in figures.stages:
        if stage.max_abs_delta:
            return stage.name
    return "head" if figures.max_abs_delta else None


def print_proof(proof: Proof) -> None:
    text, vision = proof.text, proof.vision
    print(f"text: {text.tokens} tokens, logits of hybrid and language donor")
    _print_deltas(text, "our decoder on the donor, plain rope", "logit")
    print(
        f"  top-1 agreement {text.top1_agreement:.2%}, with transformers "
        f"{text.witness_top1_agreement:.2%}"
    )
    print(f"  perplexity {text.perplexity:.6g}, the donor's {text.donor_perplexity:.6g}")
    if vision is not None:
        print(f"vision: {vision.patches} patches, what the merger reads in hybrid and donor")
        _print_deltas(vision, "our tower on the donor", "feature")
    for note in proof.notes:
        print(f"note: {note}")
    for what in proof.lost:
        print(f"LOST: {what}")
    lines = describe_differences(proof.differences)
    for line in lines[:LINES]:
        print(f"DIFFERS: {line}")
    if len(lines) > LINES:
        print(f"DIFFERS: {len(lines) - LINES} more, which --json has")
    to = [f" rounded to {dtype}" if dtype else "" for dtype in proof.rounded]
    tower = "" if vision is None else f", its tower the vision donor's{to[1]}"
    if proof.holds:
        print(f"PROVED: on text the hybrid equals the language donor{to[0]}{tower}")
    else:
        print("NOT PROVED: the hybrid does not equal what it was grafted from")


def _print_deltas(figures: TextFigures | VisionFigures, ours: str, unit: str) -> None:
    where = first_divergence(figures)
    apart = f"; apart from {where} on" if where else ""
    print(f"  max |delta {unit}| {figures.max_abs_delta:g} (must be 0) against {ours}{apart}")
    print(
        f"  {figures.witness_max_abs_delta:.1e} of the largest |{unit}| (at most "
        f"{WITNESS_TOLERANCE:g}) against transformers"
    )


def _finite(content):
    """What is nested, with None for infinities and nan, which JSON has not."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

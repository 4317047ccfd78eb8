"""The donors' tokenizers: byte-level BPE with Qwen's special tokens, learnt on the task's text.

As with the real donors, the language model's tokenizer holds every token of the vision
donor's under the same id, and a few more after them (`<think>` among them).
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from examples.digits.boards import KINDS, ask

SYSTEM = "You are a helpful assistant."
MERGES = 120
"""Enough for every word of the task to be one token."""
WORDS = (  # Qwen2's splitting: words with the space before them, single digits, punctuation
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKUP = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
ONLY_QWEN3 = ("<tool_response>", "</tool_response>", "<think>", "</think>")


def train_tokenizer() -> Tokenizer:
    """The vision donor's tokenizer; always the same one."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(WORDS), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    _add(tokenizer, CONTROL, special=True)
    _add(tokenizer, MARKUP, special=False)
    return tokenizer


def extend_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same with Qwen3's own tokens after the others: the language donor's."""
    extended = Tokenizer.from_str(tokenizer.to_str())
    _add(extended, ONLY_QWEN3, special=False)
    return extended


def _add(tokenizer: Tokenizer, tokens: tuple[str, ...], special: bool) -> None:
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(token, normalized=False, special=special) for token in tokens])


def _corpus() -> list[str]:
    """Questions and roles. No boards: each of their cells is to stay one token."""
    rng = np.random.default_rng(0)
    questions = [ask(kind, (1, 2), rng).text for kind in KINDS for _ in range(20)]
    return [SYSTEM, "system", "user", "assistant"] * 20 + questions


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str) -> None:
    """`tokenizer.json` and `tokenizer_config.json` into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": list(CONTROL[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

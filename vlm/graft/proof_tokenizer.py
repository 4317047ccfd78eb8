"""Part of the proof: the texts, and the hybrid's tokenizer against the donor's."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vlm.checkpoint import CheckpointError
from vlm.config import VLMConfig
from vlm.graft.proof_tensors import Difference
from vlm.graft.tokenizer import load_tokenizer
from vlm.hf_config import ConfigError
from vlm.model_files import check_settings, check_tokenizer

MAX_TOKENS = 2048
"""Of all texts together; what the witness's attention takes grows with the square."""
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "How many apples are left if you had 12 and gave away 5? Think step by step.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "视觉塔接到语言模型上，两者都不变。",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "Une phrase courte.",
)
FILE = "tokenizer.json"
NOT_CUTTING = ("version", "truncation", "padding")
"""Keys of `tokenizer.json` that do not tell how a text is cut."""


def read_texts(path: Path) -> list[str]:
    """One text a line; ConfigError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"{path} holds no text; write one a line")
    return texts


def encode(texts: Sequence[str], llm_dir: Path, rows: int, config: VLMConfig) -> list[Tensor]:
    """Ids of each text by the language donor's tokenizer, (t,) int64; empty ones are left out.

    Raises:
        ConfigError: too many tokens, one that stands for pixels, or one that the donor's
            embedding (of `rows`) has not.
        CheckpointError: no tokenizer.
    """
    tokenizer = load_tokenizer(llm_dir)
    ids = [tokenizer.encode(text).ids for text in texts]
    total, last = sum(map(len, ids)), max(map(max, filter(None, ids)), default=0)
    if not 0 < total <= MAX_TOKENS:
        raise ConfigError(
            f"the texts have {total} tokens and a proof takes 1 to {MAX_TOKENS}; give "
            f"{'fewer or shorter' if total else 'other'} ones"
        )
    pixels = {config.image_token_id, config.video_token_id} & set().union(*ids)
    if pixels:
        token = tokenizer.id_to_token(min(pixels))
        raise ConfigError(
            f"the texts hold {token}, which stands for the pixels of an image or a video; give "
            "texts without it"
        )
    if last >= rows:
        raise ConfigError(
            f"{llm_dir}: tokenizer.json gives token {last}, and the embedding has {rows} rows; "
            "they are not of one model"
        )
    return [torch.tensor(own) for own in ids if own]


def compare_tokenizer(
    texts: Sequence[str], model_dir: Path, donor_dir: Path, config: VLMConfig, more: bool
) -> list[Difference]:
    """Differences of the hybrid's tokenizer from the donor's, and what does not fit its config.

    Args:
        donor_dir: of the donor whose tokenizer the hybrid should have.
        more: the hybrid's may have tokens that this donor's has not.
    """
    ours, theirs = load_tokenizer(model_dir), load_tokenizer(donor_dir)
    held, expected = (one.get_vocab(with_added_tokens=True) for one in (ours, theirs))
    found = []
    others = [token for token, index in expected.items() if held.get(token) != index]
    others += [] if more else [token for token in held if token not in expected]
    if others:
        how = f"{len(others)} tokens have not the donor's ids, such as {min(others)!r}"
        found.append(Difference(FILE, how))
    cut = sum(ours.encode(text).ids != theirs.encode(text).ids for text in texts)
    if cut:
        found.append(
            Difference(FILE, f"cuts {cut} of {len(texts)} texts otherwise than the donor's")
        )
    if not found and not more and _how_it_cuts(ours) != _how_it_cuts(theirs):
        found.append(Difference(FILE, "has the donor's tokens and cuts texts by other rules"))
    # of which `Processor` makes errors wherever a model is used
    for name, check in (
        (FILE, lambda: check_tokenizer(model_dir / FILE, ours, config)),
        ("settings of the processor", lambda: check_settings(model_dir, config)),
    ):
        try:
            check()
        except CheckpointError as error:
            found.append(Difference(name, str(error)))
    return found


def _how_it_cuts(tokenizer: Tokenizer) -> dict:
    content = json.loads(tokenizer.to_str())
    return {key: value for key, value in content.items() if key not in NOT_CUTTING}

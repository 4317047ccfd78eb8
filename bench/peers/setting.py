"""What every system trains: a tiny stock Qwen2.5-VL and a small multimodal data set, from a seed.

The model has the hub's layout and one of two sizes (`SIZES`). The lengths are those of
`bench/lengths/instruction.npz`, an eighth of them: a fifth of the samples is text alone, and the
longest of a step is two to five times its mean. A row is `{"messages": [...], "images": [...]}`,
which all of the systems read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlm.checkpoint import save_model
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.limits import Limits
from vlm.data.plan import epoch_order
from vlm.data.processor import Processor, Sizes
from vlm.hf_config import parse_config, read_json
from vlm.model import VisionLanguageModel, initialise

BENCH = Path(__file__).parents[1]
GOLDEN_MODEL = BENCH.parent / "tests" / "golden" / "model"
"""Whose tokenizer and chat template the tiny model has."""
GLOBAL_BATCH = 16
"""Samples of a step: the recipe's 2 x 8 on one device."""
SEED = 42
"""Of the model, of the data, and of every system."""
SCALE = 8
"""Lengths and areas of images are the recorded ones divided by this."""
MIN_PIXELS, MAX_PIXELS = Limits.min_pixels, Limits.max_pixels // SCALE
WRAPPING = 26
"""Tokens of the default system prompt, the roles and the ends of turns."""
IMAGE = 28
"""Side in pixels of a visual token."""

SMALL_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "max_window_layers": 6,
    "num_attention_heads": 8,
}
SMALL_VISION = {
    "depth": 8,
    "hidden_size": 80,
    "num_heads": 5,
    "intermediate_size": 216,
    "out_hidden_size": 256,
    "fullatt_block_indexes": [7],
}
SIZES = {"tiny": ({}, {}), "small": (SMALL_TEXT, SMALL_VISION)}
"""Decoder and ViT, over the golden model's config. `tiny` is that model; `small` has the 7B's
proportions: a ViT that costs a third of the decoder for each visual token, and attends in full in
one block of eight."""


@dataclass(frozen=True)
class Setting:
    """Files of a comparison; a step has the same samples for every system, but for `grouped`."""

    model: Path
    warm_up: int
    """Steps that are not timed."""
    steps: int
    """Steps that are."""
    sequence: Path
    """The samples of the warm-up and of the timed steps, in their order."""
    ours: Path
    """The same, placed so that our plan of the first epoch has them in that order."""
    grouped: Path
    """The same number, the timed steps' samples sorted by length, the longest first, as Trainer's
    `group_by_length` has them inside 50 steps."""
    exact: Path
    """One global batch whose images need no resizing, so that all systems see the same pixels."""
    sizes: tuple[Sizes, ...]
    """Of the samples of the timed steps, in their order."""

    @property
    def samples(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> int:
        """Of the timed steps, images included."""
        return sum(sizes.length for sizes in self.sizes)


def write_setting(folder: Path, size: str, warm_up: int, steps: int) -> Setting:
    """Model and data in `folder`, the same for the same numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    model = write_model(folder / "model", size)
    rng = np.random.default_rng(SEED)
    timed = write_rows(folder, "timed", steps * GLOBAL_BATCH, rng)
    warming = write_rows(folder, "warming", warm_up * GLOBAL_BATCH, rng)
    exact = write_rows(folder, "exact", GLOBAL_BATCH, rng, resized=False)
    order = epoch_order((len(warming + timed),), (1.0,), SEED, epoch=0)
    placed = [(warming + timed)[i] for i in np.argsort(order)]
    processor = Processor.from_pretrained(model, Limits(max_pixels=MAX_PIXELS))
    sizes = [_sizes(processor, folder, row) for row in timed]
    grouped = [timed[i] for i in np.argsort([-size.length for size in sizes])]
    return Setting(
        model=model,
        warm_up=warm_up,
        steps=steps,
        sequence=_write_lines(folder / "sequence.jsonl", warming + timed),
        ours=_write_lines(folder / "ours.jsonl", placed),
        grouped=_write_lines(folder / "grouped.jsonl", warming + grouped),
        exact=_write_lines(folder / "exact.jsonl", exact),
        sizes=tuple(sizes),
    )


def write_model(folder: Path, size: str) -> Path:
    """A random stock Qwen2.5-VL, with the hub's names of weights; returns its directory."""
    text, vision = SIZES[size]
    raw = read_json(GOLDEN_MODEL / "config.json") | {"torch_dtype": "float32"} | text
    raw["vision_config"] = raw["vision_config"] | vision
    model = VisionLanguageModel(parse_config(raw))
    initialise(model, torch.Generator().manual_seed(SEED), std=0.05)
    hub = {"model.visual.": "visual.", "model.language_model.": "model."}
    state = model.state_dict()
    for ours, theirs in hub.items():
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    save_model(folder, state.items(), GOLDEN_MODEL, raw)
    return folder


def write_rows(
    folder: Path, name: str, count: int, rng: np.random.Generator, resized: bool = True
) -> list[dict]:
    """Rows and their images, drawn from the recorded lengths.

    Args:
        resized: images of any size, a few larger than MAX_PIXELS; else whole visual tokens.
    """
    with np.load(BENCH / "lengths" / "instruction.npz") as file:
        columns = np.stack([file[column] for column in ("lengths", "targets", "patches")], axis=1)
    drawn = columns[rng.integers(len(columns), size=count)]
    words = _words()
    rows = []
    for number, (length, targets, patches) in enumerate((drawn // SCALE).tolist()):
        visual = patches // 4
        images = []
        while visual >= 4:  # of at most MAX_PIXELS each
            tokens = min(visual, MAX_PIXELS // IMAGE**2)
            path = f"{name}-{number}-{len(images)}.jpg"
            _picture(tokens, rng, resized).save(folder / path, quality=90)
            images.append(str(folder / path))
            visual -= tokens
        answer = max(targets - 1, 1)
        question = max(length - patches // 4 - 2 * len(images) - answer - WRAPPING, 1)
        ask, reply = (" ".join(rng.choice(words, size)) for size in (question, answer))
        turns = [
            {"role": "user", "content": "<image>" * len(images) + ask},
            {"role": "assistant", "content": reply},
        ]
        rows.append({"messages": turns} | ({"images": images} if images else {}))
    return rows


def _picture(tokens: int, rng: np.random.Generator, resized: bool) -> Image.Image:
    """Smooth noise of about so many visual tokens."""
    rows = max(round((tokens * rng.uniform(0.6, 1.6)) ** 0.5), 1)
    height, width = IMAGE * rows, IMAGE * max(tokens // rows, 1)
    if resized:
        if tokens > 0.8 * MAX_PIXELS / IMAGE**2:  # a photo larger than is wanted
            height, width = int(1.5 * height), int(1.5 * width)
        height, width = (side + int(rng.integers(-9, 10)) for side in (height, width))
    levels = rng.integers(0, 256, (height // 14 + 1, width // 14 + 1, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def _words() -> list[str]:
    """Words that are one token each after a space."""
    vocabulary = read_json(GOLDEN_MODEL / "tokenizer.json")["model"]["vocab"]
    pieces = [token[1:] for token in vocabulary if token.startswith("Ġ")]
    return [word for word in pieces if word.isascii() and word.isalpha()]


def _sizes(processor: Processor, folder: Path, row: dict) -> Sizes:
    return processor.measure(parse_row(row, "sample", RowContext(folder)))


def _write_lines(path: Path, rows: list[dict]) -> Path:
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_text(text + "\n", encoding="utf-8")
    return path

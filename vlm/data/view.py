"""See the data as the model sees it: one self-contained HTML page.

    python -m vlm.data.view data/train.jsonl --model models/graft-8b --out page.html

Shown are what the samples take (a histogram of their lengths), what is wrong with the bad ones, how
the first global batch is packed, and the first samples themselves: images rebuilt from the very
patches that the model gets, tokens coloured by whether they are learnt, their roles and positions.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vlm.config import VisionConfig, VLMConfig
from vlm.cost import PARTS
from vlm.data.index import Index, build_index
from vlm.data.index_cache import default_cache_dir
from vlm.data.ledger import Entry
from vlm.data.options import data_parser, exit_code, open_data
from vlm.data.out_file import check_out, written
from vlm.data.pack import Budget, arrange
from vlm.data.processor import IGNORED, Example, Processor
from vlm.data.schema import BadSample, printable
from vlm.data.sources import Source
from vlm.data.view_page import Piece, View, render_page

COUNTS = (
    "samples",
    "dataset_num_proc",
    "world",
    "global_batch_size",
    "token_budget",
    "patch_budget",
)
"""Options that must be above 0."""


def pieces(example: Example, processor: Processor) -> list[Piece]:
    """An example's tokens, in order, as they are shown."""
    ids = example.input_ids.tolist()
    # the target of row r is the token of row r + 1
    learnt = [0.0, *_weights(example)[:-1]]
    start = processor.tokenizer.token_to_id("<|im_start|>")
    media = (processor.config.image_token_id, processor.config.video_token_id)
    found, first = [], 0
    while first < len(ids):
        end = first + 1
        if ids[first] in media:
            while end < len(ids) and ids[end] == ids[first]:
                end += 1
            text = processor.tokenizer.id_to_token(ids[first]) + f" × {end - first}"
        else:
            text = _decode(processor, ids[first:end])
            # a character may be spread over several tokens
            while "\ufffd" in text and end < min(len(ids), first + 4):
                longer = _decode(processor, ids[first : end + 1])
                if learnt[end] != learnt[first] or ids[end] in media:
                    break
                end, text = end + 1, longer
        where = tuple(_range(axis[first:end]) for axis in example.position_ids)
        found.append(
            Piece(text, first, tuple(ids[first:end]), learnt[first], where, ids[first] == start)
        )
        first = end
    return found


def _weights(example: Example) -> list[float]:
    ones = (example.targets != IGNORED).float()
    return (ones if example.weights is None else ones * example.weights).tolist()


def _decode(processor: Processor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def _range(values: Tensor) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low}–{high}"


def pictures(example: Example, config: VisionConfig) -> list[list[Tensor]]:
    """Each image's, or each video's, frames (height, width, 3) uint8, out of the patches.

    A video has one frame a temporal patch: the first of the two that it holds.
    """
    shown, first = [], 0
    for t, h, w in example.grid_thw:
        patches = example.patches[first : first + t * h * w]
        shown.append([unpatchify(frame, h, w, config) for frame in patches.split(h * w)])
        first += t * h * w
    return shown


def unpatchify(patches: Tensor, height: int, width: int, config: VisionConfig) -> Tensor:
    """Undo `vlm.data.image.patchify` for one temporal patch: its first frame.

    Args:
        patches: (height * width, patch_dim) uint8; height and width count patches.

    Returns:
        (height * patch_size, width * patch_size, 3) uint8.
    """
    side, merge, depth = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    blocks = patches.view(height // merge, width // merge, merge, merge, 3, depth, side, side)
    frame = blocks[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4)  # rows, columns, channel
    return frame.reshape(height * side, width * side, 3)


def look(sources: tuple[Source, ...], processor: Processor, options: argparse.Namespace) -> View:
    """Measure all the data, and encode what is shown of it."""
    index, bad = build_index(sources, processor, options.dataset_num_proc, default_cache_dir())
    samples = []
    for number in range(len(index)):
        if len(samples) == options.samples:
            break
        try:
            example = processor.encode(index.sample(number))
        except BadSample as error:  # its header was good
            bad.append(Entry(error.sample_id, error.reason, "decoding"))
            continue
        shown = pictures(example, processor.config.vision)
        samples.append((example, pieces(example, processor), shown))
    return View(
        data=options.data,
        model=str(options.model),
        index=index,
        bad=bad,
        packs=_first_batch(index, processor.config, options),
        token_budget=options.token_budget,
        samples=samples,
        vision=processor.config.vision,
    )


def _first_batch(index: Index, config: VLMConfig, options) -> list[list[list[int]]]:
    """[rank][micro-batch][sample] of the first samples, as a step would pack them."""
    some = slice(options.global_batch_size)
    budget = Budget(tokens=options.token_budget, patches=options.patch_budget)
    costs = index.costs(config, PARTS)[some]
    return arrange(costs, index.length[some], index.patches[some], options.world, budget)


def parse_arguments(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    parser = data_parser("view", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--samples", type=int, default=20, help="how many are shown")
    parser.add_argument("--dataset_num_proc", type=int, default=1, help="processes that index")
    parser.add_argument("--world", type=int, default=8, help="ranks of the packed batch")
    parser.add_argument("--global_batch_size", type=int, default=128)
    parser.add_argument("--token_budget", type=int, default=Budget.tokens)
    parser.add_argument("--patch_budget", type=int, default=Budget.patches)
    return parser.parse_args(arguments)


def write_page(arguments: Iterable[str] | None) -> int:
    options = parse_arguments(arguments)
    check_out("out", options.out)
    for name in COUNTS:
        if (count := getattr(options, name)) < 1:
            raise ValueError(f"{name} is {count}; it must be above 0")
    view = look(*open_data(options), options)
    with written(options.out) as file:
        file.write(render_page(view))
    print(printable(f"{len(view.index)} good samples, {len(view.bad)} bad; wrote {options.out}"))
    return 0


def main(arguments: Iterable[str] | None = None) -> int:
    torch.set_num_threads(1)
    return exit_code(lambda: write_page(arguments), "interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())

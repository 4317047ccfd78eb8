"""What training would see of each sample, as JSON, to compare with another stack.

    python -m vlm.data.encode data/train.jsonl --model models/graft-8b --out encoded.jsonl

One line a sample, in order: `id`, `input_ids`, `labels` (not shifted; -100 is not learnt),
`loss_scale` where a weight is neither 0 nor 1, `image_grid_thw`, `video_grid_thw`,
`second_per_grid_ts`, `position_ids` (3 rows: time, height, width) and `pixel_values` (shape, mean,
std and the sums of the first 8 rows of the normalised patches); or `error`, why it is bad.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vlm.data.options import data_parser, exit_code, open_data, rows_of
from vlm.data.out_file import check_out, written
from vlm.data.processor import IGNORED, Example, Processor
from vlm.data.schema import BadSample, Sample, printable
from vlm.data.sources import Source
from vlm.vision import normalise


def encoded(
    sources: tuple[Source, ...], processor: Processor, prompt: bool = False
) -> Iterator[dict]:
    """A JSON object for every row of the data.

    Args:
        prompt: up to where the assistant's next words begin, as chat and servers see it.
    """
    for source, row, place in rows_of(sources):
        try:
            sample = source.parse(row, place)
            example = processor.prompt(_question(sample)) if prompt else processor.encode(sample)
            yield describe(example, processor)
        except BadSample as error:
            yield {"id": error.sample_id, "error": error.reason}


def _question(sample: Sample) -> Sample:
    """The sample without the answer that it ends with."""
    messages = list(sample.messages)
    while messages and messages[-1].role in ("assistant", "tool_call"):
        messages.pop()
    if not messages:
        raise BadSample(sample.id, "has an answer and nothing before it")
    return replace(sample, messages=tuple(messages))


def describe(example: Example, processor: Processor) -> dict:
    """An example in the field's terms."""
    # a target belongs to the row before the token that is learnt
    labels = [IGNORED, *example.targets[:-1].tolist()]
    line = {"id": example.id, "input_ids": example.input_ids.tolist(), "labels": labels}
    if example.weights is not None:
        line["loss_scale"] = [0.0, *example.weights[:-1].tolist()]
    images, videos = _grids(example, processor)
    if images:
        line["image_grid_thw"] = images
    if videos:
        line |= {"video_grid_thw": videos, "second_per_grid_ts": list(example.second_per_grid)}
    line["position_ids"] = example.position_ids.tolist()
    if len(example.patches):
        line["pixel_values"] = summary(normalise(example.patches))
    return line


def summary(pixels: Tensor) -> dict:
    """Of normalised patches (P, patch_dim) float32; in float64, so that order hardly matters."""
    exact = pixels.double()
    return {
        "shape": list(pixels.shape),
        "mean": exact.mean().item(),
        "std": exact.std(correction=0).item(),
        "row_sum_first8": exact[:8].sum(1).tolist(),
    }


def _grids(example: Example, processor: Processor) -> tuple[list[list[int]], list[list[int]]]:
    """Those of the images, and those of the videos: which is which is told by the tokens."""
    starts = example.input_ids[:-1] == processor.config.vision_start_token_id
    is_video = (example.input_ids[1:][starts] == processor.config.video_token_id).tolist()
    pairs = list(zip(map(list, example.grid_thw), is_video, strict=True))
    return [grid for grid, video in pairs if not video], [grid for grid, video in pairs if video]


def parse_arguments(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    parser = data_parser("encode", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--prompt", action="store_true", help="prompts without their answer")
    return parser.parse_args(arguments)


def write_encoded(arguments: Iterable[str] | None) -> int:
    options = parse_arguments(arguments)
    check_out("out", options.out)
    lines = encoded(*open_data(options), options.prompt)
    good = bad = 0
    with written(options.out) as file:
        for line in tqdm(lines, desc="encode", unit=" samples", disable=None):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            bad += "error" in line
            good += "error" not in line
    print(printable(f"{good} samples encoded, {bad} bad; wrote {options.out}"))
    return 0


def main(arguments: Iterable[str] | None = None) -> int:
    torch.set_num_threads(1)
    return exit_code(lambda: write_encoded(arguments), "interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())

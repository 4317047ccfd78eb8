"""The samples whose cost is asked for: a JSONL file of their sizes, or one described by flags.

A line of the file is one sample: tokens in all, tokens that are learnt, and the grids of its
images and videos, (time, height, width) in patches, each of which takes
time x height x width / 4 of the tokens.

    {"length": 700, "targets": 80, "grids": [[1, 36, 52]]}
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlm.batch import Batch
from vlm.config import VisionConfig, VLMConfig
from vlm.data.collate import collate
from vlm.data.image import BadImage, smart_resize
from vlm.data.limits import Limits
from vlm.data.processor import IGNORED, Example

FORM = '{"length": 700, "targets": 80, "grids": [[1, 36, 52]]}'
LARGEST = 10**6
"""Of tokens in a sample and of whatever else is counted: far beyond any training, and with it no
figure leaves int64."""


class CostError(ValueError):
    """What was asked for cannot be counted; the message says why."""


@dataclass(frozen=True)
class Samples:
    """Legend: n samples, m images and videos in all; int64 arrays."""

    lengths: np.ndarray
    """(n,) tokens."""
    targets: np.ndarray
    """(n,) tokens that are learnt."""
    grids: np.ndarray
    """(m, 3) time, height and width in patches."""
    owners: np.ndarray
    """(m,) number of the sample that each grid belongs to."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def patches(self) -> np.ndarray:
        """(n,)."""
        counts = np.zeros(len(self), np.int64)
        np.add.at(counts, self.owners, self.grids.prod(axis=1))
        return counts

    @classmethod
    def of(cls, rows: list[tuple[int, int, list[list[int]]]]) -> "Samples":
        """From (length, targets, grids) of each."""
        owners = [number for number, (_, _, grids) in enumerate(rows) for _ in grids]
        grids = [grid for _, _, of_one in rows for grid in of_one]
        return cls(
            np.array([length for length, _, _ in rows], np.int64),
            np.array([targets for _, targets, _ in rows], np.int64),
            np.array(grids, np.int64).reshape(-1, 3),
            np.array(owners, np.int64),
        )


def micro_batch(config: VLMConfig, samples: Samples) -> Batch:
    """One that packs all of the samples, on the CPU: random images first, and the last tokens
    learnt."""
    examples = []
    for number, (length, learnt) in enumerate(zip(samples.lengths, samples.targets, strict=True)):
        grids = samples.grids[samples.owners == number]
        patches = int(grids.prod(axis=1).sum())
        ids = torch.zeros(length, dtype=torch.int64)
        ids[: patches // config.vision.merge_unit] = config.image_token_id
        targets = torch.full((length,), IGNORED)
        targets[length - learnt :] = 1
        positions = torch.arange(length).expand(3, -1)
        pixels = torch.randint(0, 256, (patches, config.vision.patch_dim), dtype=torch.uint8)
        media = (pixels, tuple(map(tuple, grids.tolist())))
        examples.append(Example(str(number), ids, targets, None, positions, *media))
    return collate(examples, config)


def read_samples(path: Path, vision: VisionConfig) -> Samples:
    """The samples of a JSONL file; CostError names the file and the line that is wrong."""
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_parse(line, f"{path}:{number}", vision))
    except (OSError, UnicodeDecodeError) as error:
        raise CostError(f"{path} cannot be read: {error}") from None
    if not rows:
        raise CostError(f"{path} holds no sample")
    return Samples.of(rows)


def one_sample(
    tokens: int, targets: int, images: list[tuple[int, int]], vision: VisionConfig, limits: Limits
) -> Samples:
    """A sample with images of (height, width) pixels, resized as in training."""
    factor = vision.patch_size * vision.spatial_merge_size
    grids = []
    for height, width in images:
        try:
            sides = smart_resize(height, width, *limits.image_pixels, factor)
        except BadImage as error:
            raise CostError(f"--images: {error}") from None
        grids.append([1, *(side // vision.patch_size for side in sides)])
    return Samples.of([_check(tokens, targets, grids, "the sample", vision)])


def _parse(line: str, place: str, vision: VisionConfig) -> tuple[int, int, list[list[int]]]:
    try:
        content = json.loads(line)
        length, targets = content["length"], content["targets"]
        grids = content.get("grids", [])
        if not all(type(n) is int for n in (length, targets)):
            raise ValueError("length and targets must be integers")
        if not all(len(grid) == 3 and all(type(n) is int for n in grid) for grid in grids):
            raise ValueError("grids must hold [time, height, width] of integers")
    except KeyError as error:
        raise CostError(f"{place} has no {error}") from None
    except RecursionError:
        raise CostError(f"{place} is not of the form {FORM}: it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CostError(f"{place} is not of the form {FORM}: {error}") from None
    return _check(length, targets, grids, place, vision)


def _check(
    length: int, targets: int, grids: list[list[int]], place: str, vision: VisionConfig
) -> tuple[int, int, list[list[int]]]:
    """The arguments, or CostError."""
    merge = vision.spatial_merge_size
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise CostError(
                f"{place}: grid {[t, h, w]} is no (time, height, width) in patches above 0, "
                f"height and width multiples of {merge}"
            )
    if length > LARGEST:
        raise CostError(f"{place} has more than {LARGEST:,} tokens, the most that is counted")
    visual = sum(t * h * w for t, h, w in grids) // vision.merge_unit
    if targets < 0 or length < max(1, visual + targets):
        raise CostError(
            f"{place}: {length} tokens cannot hold {visual} visual tokens and {targets} targets"
        )
    return length, targets, grids

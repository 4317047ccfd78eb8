"""Random samples packed by hand, independent of the project's own collator."""

import torch

from vlm.batch import Batch, Segments
from vlm.rope import mrope_positions
from vlm.vision import plan_vision

IMAGE, VIDEO, START, END = 90, 91, 92, 93
"""Ids for tests whose vocabulary has 96 tokens."""


def make_sample(text: int, grids, generator, image=IMAGE, start=START, end=END):
    """Ids with one placeholder per visual token, and uint8 patches."""
    ids = torch.randint(0, 80, (text,), generator=generator).tolist()
    for t, h, w in grids:
        ids += [start, *[image] * (t * h * w // 4), end, 7]
    count = sum(t * h * w for t, h, w in grids)
    patches = torch.randint(0, 256, (count, 1176), generator=generator, dtype=torch.uint8)
    return torch.tensor(ids), patches


def pack(samples, config, image=IMAGE) -> Batch:
    ids = torch.cat([ids for ids, _, _ in samples])
    grids = [grid for _, _, grids in samples for grid in grids]
    patches = torch.cat([patches for _, patches, _ in samples])
    if not grids:  # text alone carries a blank dummy
        grids, patches = [(1, 2, 2)], torch.zeros(4, config.vision.patch_dim, dtype=torch.uint8)
    lengths = [len(ids) for ids, _, _ in samples]
    ends = torch.tensor(lengths).cumsum(0) - 1
    rows = torch.tensor([r for r in range(len(ids)) if r not in ends.tolist()])
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([mrope_positions(i, g, config) for i, _, g in samples], dim=1),
        segments=Segments.of(lengths),
        target_rows=rows,
        targets=ids[rows + 1],
        weights=None,
        visual_rows=(ids == image).nonzero().flatten(),
        patches=patches,
        vision=plan_vision(grids, config.vision),
        ids=(),
    )

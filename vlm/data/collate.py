"""Examples -> Batch: everything the model needs, computed in the worker."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vlm.batch import Batch, Features, Segments, VisionPlan
from vlm.config import VLMConfig
from vlm.data.media import Grid
from vlm.data.processor import IGNORED, Example
from vlm.vision import plan_vision


def collate(
    examples: Sequence[Example], config: VLMConfig, sources: Sequence[int] | None = None
) -> Batch:
    """Pack examples one after the other: no padding, no batch axis.

    Args:
        sources: number of the source that each example is from; 0 for all where not given.

    A micro-batch without an image or video gets a blank dummy, and one without any sample a
    single token and no target: every rank must run both towers in every micro-batch.
    """
    names = tuple(example.id for example in examples)
    sources = sources or [0] * max(len(examples), 1)
    if not examples:
        examples = [_blank(config)]
    ids = torch.cat([example.input_ids for example in examples])
    targets = torch.cat([example.targets for example in examples])
    rows = (targets != IGNORED).nonzero().flatten()
    weights = None
    if any(example.weights is not None for example in examples):
        ones = [torch.ones(example.length) for example in examples]
        pairs = zip(examples, ones, strict=True)
        weights = torch.cat([one if e.weights is None else e.weights for e, one in pairs])[rows]
    grids = [grid for example in examples for grid in example.grid_thw]
    patches = torch.cat([example.patches for example in examples])
    if not grids:
        side = config.vision.spatial_merge_size
        grids = [(1, side, side)]
        patches = torch.zeros(side**2, config.vision.patch_dim, dtype=torch.uint8)
    features = _joined([example.features for example in examples if example.features])
    lengths = [example.length for example in examples]
    visual = (ids == config.image_token_id) | (ids == config.video_token_id)
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([example.position_ids for example in examples], dim=1),
        segments=Segments.of(lengths),
        target_rows=rows,
        targets=targets[rows],
        weights=weights,
        visual_rows=visual.nonzero().flatten(),
        patches=patches,
        vision=_plan(grids, features, config),
        ids=names,
        sources=torch.tensor(sources).repeat_interleave(torch.tensor(lengths))[rows],
        features=features,
    )


def _joined(parts: Sequence[Features]) -> Features | None:
    """None without any image or video."""
    media = tuple(medium for part in parts for medium in part.media)
    return Features(torch.cat([part.rows for part in parts]), media) if media else None


def _plan(grids: Sequence[Grid], features: Features | None, config: VLMConfig) -> VisionPlan:
    """Of the media that are computed, but for `reverse_index`."""
    plan = plan_vision(grids, config.vision)
    if features is None:
        return plan
    computed = [grid for grid, (_, key) in zip(grids, features.media, strict=True) if key]
    if not computed:  # nothing walks through it
        return plan
    return replace(plan_vision(computed, config.vision), reverse_index=plan.reverse_index)


def _blank(config: VLMConfig) -> Example:
    return Example(
        id="",
        input_ids=torch.zeros(1, dtype=torch.int64),
        targets=torch.tensor([IGNORED]),
        weights=None,
        position_ids=torch.zeros(3, 1, dtype=torch.int64),
        patches=torch.zeros(0, config.vision.patch_dim, dtype=torch.uint8),
        grid_thw=(),
    )

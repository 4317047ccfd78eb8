"""Part of the proof: the vision tower's features before the merger, one block at a time.

Legend: P patches, D hidden size of the tower.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from vlm.checkpoint import TensorReader
from vlm.config import VisionConfig
from vlm.graft.proof_tensors import DonorTensors
from vlm.graft.proof_text import Stage, Tensors, part
from vlm.rope import vision_tables
from vlm.vision import VisionBlock, VisionTower, normalise, plan_vision

EMBEDDING = "model.visual.patch_embed.proj.weight"
BLOCK = "model.visual.blocks.{}."
SHAPES = ((1, 1, 1), (1, 5, 9), (2, 3, 4), (1, 2, 3))
"""(time, height, width) of the images in visual tokens; the third is a video of two steps."""


@dataclass(frozen=True)
class VisionFigures:
    """What was measured on synthetic images, of the features that the merger reads."""

    patches: int
    max_abs_delta: float
    """Against our tower on the vision donor's tensors."""
    witness_max_abs_delta: float
    """Against transformers' Qwen2.5-VL, as a share of its largest |feature|."""
    stages: list[Stage]


def synthetic_images(config: VisionConfig) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Patches (P, patch_dim) uint8 of a black image and of ramps, and their grids in patches."""
    merge = config.spatial_merge_size
    grids = [(t, h * merge, w * merge) for t, h, w in SHAPES]
    images = []
    for number, (t, h, w) in enumerate(grids):
        levels = torch.arange(t * h * w * config.patch_dim) * number * 7
        images.append((levels // 5 % 256).to(torch.uint8).view(-1, config.patch_dim))
    return torch.cat(images), grids


def compare_towers(
    config: VisionConfig,
    hybrid: TensorReader,
    donor_config: VisionConfig,
    donor: DonorTensors,
    donor_raw: dict,
) -> VisionFigures:
    """Run both towers and transformers' on the same images.

    Args:
        donor_raw: the `vision_config` of the donor, which the witness reads by itself.
    """
    from vlm.graft.proof_witness import witness_trunk  # transformers: not for `build`

    patches, grids = synthetic_images(config)
    witness = witness_trunk(
        donor_raw,
        normalise(patches),
        grids,
        donor.get(EMBEDDING).float(),
        lambda index: part(donor, BLOCK.format(index)),
    )
    ours = TowerStream(config, hybrid, patches, grids)
    theirs = TowerStream(donor_config, donor, patches, grids)
    stages = [Stage.of("patch_embed", ours.x, theirs.x, witness[0])]
    for index in tqdm(range(config.depth), desc="vision", unit=" blocks", disable=None):
        ours.advance(index)
        theirs.advance(index)
        stages.append(Stage.of(f"blocks.{index}", ours.x, theirs.x, witness[index + 1]))
    last = stages[-1]
    return VisionFigures(len(patches), last.max_abs_delta, last.witness_max_abs_delta, stages)


class TowerStream:
    """What `VisionTower.trunk` computes, block by block from a file."""

    def __init__(
        self,
        config: VisionConfig,
        tensors: Tensors,
        patches: Tensor,
        grids: list[tuple[int, int, int]],
    ) -> None:
        self.config, self.tensors, self.plan = config, tensors, plan_vision(grids, config)
        self.tables = vision_tables(self.plan.positions, config.head_dim)
        with torch.device("meta"):
            tower = VisionTower(replace(config, depth=0))
        weight = tensors.get(EMBEDDING).float()
        tower.patch_embed.load_state_dict({"proj.weight": weight}, assign=True)
        self.x = tower.trunk(patches, self.plan)  # (P, D) in window order, through no block

    def advance(self, index: int) -> None:
        with torch.device("meta"):
            block = VisionBlock(self.config)
        block.load_state_dict(part(self.tensors, BLOCK.format(index)), assign=True)
        full = index in self.config.fullatt_block_indexes
        segments = self.plan.frames if full else self.plan.windows
        self.x = block(self.x, *self.tables, segments)

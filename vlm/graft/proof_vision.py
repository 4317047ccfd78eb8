"""Part of the proof: the vision tower's features before the merger, one block at a time.

Legend: P patches, D hidden size of the tower.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vlm.checkpoint import TensorReader
from vlm.config import VisionConfig, VLMConfig
from vlm.graft.plan import MERGER, scale_mrope_section
from vlm.graft.proof_tensors import (
    Difference,
    DonorTensors,
    compare_dtypes,
    compare_settings,
    compare_tensors,
    dtype_notes,
    open_checked,
    rounded,
)
from vlm.graft.proof_text import Stage, Tensors, part
from vlm.hf_config import MEDIA_TOKENS, ConfigError, read_config, read_json
from vlm.model import VisionLanguageModel
from vlm.rope import vision_tables
from vlm.vision import VisionBlock, VisionTower, normalise, plan_vision

EMBEDDING = "model.visual.patch_embed.proj.weight"
BLOCK = "model.visual.blocks.{}."
SHAPES = ((1, 1, 1), (1, 5, 9), (2, 3, 4), (1, 2, 3))
"""(time, height, width) of the images in visual tokens; the third is a video of two steps."""
TOWER_SHAPE = (
    "depth",
    "hidden_size",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
)
"""Without the same shape the towers cannot run side by side."""
TOWER_SETTINGS = (
    "num_heads",
    "intermediate_size",
    "fullatt_block_indexes",
    "window_size",
    "tokens_per_second",
)


@dataclass(frozen=True)
class VisionFigures:
    """What was measured on synthetic images, of the features that the merger reads."""

    patches: int
    max_abs_delta: float
    """Against our tower on the vision donor's tensors."""
    witness_max_abs_delta: float
    """Against transformers' Qwen2.5-VL, as a share of its largest |feature|."""
    stages: list[Stage]


@dataclass(frozen=True)
class TowerProof:
    """The vision half of a proof."""

    donor: TensorReader
    figures: VisionFigures
    differences: list[Difference]
    notes: list[str]
    rounded: str
    """The dtype to which the donor's values were rounded, or empty."""


def verify_tower(
    config: VLMConfig, hybrid: TensorReader, vision_dir: Path, head_dim: int, asked: str | None
) -> TowerProof:
    """Compare the tower with the vision donor's; what of the merger is the donor's is not here.

    Args: head_dim: the language donor's; asked: as for `compare_dtypes`.

    Raises:
        ConfigError, CheckpointError: no vision donor of this hybrid.
    """
    raw, theirs = read_json(vision_dir / "config.json"), read_config(vision_dir)
    for wrong in compare_settings(config.vision, theirs.vision, TOWER_SHAPE):
        raise ConfigError(f"{vision_dir} is not the vision donor of {hybrid.dir}: {wrong.how}")
    if theirs.text.mrope_section is None:
        raise ConfigError(f"{vision_dir / 'config.json'} has no mrope_section; it is no Qwen2.5-VL")
    tied = theirs.text.tie_word_embeddings
    held = open_checked(vision_dir, VisionLanguageModel, theirs, tied)
    donor = DonorTensors(held, hybrid)
    differences = compare_settings(config.vision, theirs.vision, TOWER_SETTINGS)
    differences += compare_settings(config, theirs, MEDIA_TOKENS)
    section = tuple(scale_mrope_section(theirs.text.mrope_section, head_dim))
    if config.text.mrope_section != section:
        how = f"mrope_section is {config.text.mrope_section}, from the vision donor's {section}"
        differences.append(Difference("config.json", how))
    names = [n for n in donor.names() if n.startswith("model.visual.") and MERGER not in n]
    pairs = [(name, name) for name in names]
    differences += compare_tensors(pairs, hybrid, donor)
    differences += compare_dtypes(pairs, hybrid, donor, asked)
    figures = compare_towers(config.vision, hybrid, theirs.vision, donor, raw["vision_config"])
    notes = dtype_notes(donor, "vision", names)
    return TowerProof(held, figures, differences, notes, rounded(donor, names))


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
            tower = VisionTower(replace(config, depth=1, fullatt_block_indexes=()))
        tower.blocks = nn.ModuleList()
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

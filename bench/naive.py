"""The loop that costs are compared with: transformers' own model of the hybrid under the recipe's
flags, its FLOPs by formula and as torch counts them on the meta device.

Pairs of samples are padded to the longer one, every block is computed once more in the backward
pass (`gradient_checkpointing`), and there are logits for every token. With that flag transformers
asks for gradients of the outputs of both embeddings (`enable_input_require_grads`), so that in
stage 1 they travel through the whole decoder for text alone, too, and through the frozen ViT.
"""

import numpy as np
import torch
from torch import Tensor, nn

from bench.meta import count
from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost import PARTS, text_flops, vision_flops
from vlm.cost.samples import Samples

TRAINS = {1: ("aligner",), 2: PARTS}
"""Parts, by stage."""
USEFUL = "useful"
FROZEN = "gradients through the frozen ViT"
"""Its blocks computed again among it."""


def naive_flops(config: VLMConfig, samples: Samples, stage: int) -> int:
    """Of an even number of samples, each two of which are a micro-batch."""
    return list(growth(config, samples, stage).values())[-1]


def growth(config: VLMConfig, samples: Samples, stage: int) -> dict[str, int]:
    """From the useful FLOPs of a gradient to the loop's: what it does -> its FLOPs with that and
    all above. The samples as in `naive_flops`."""
    trains = TRAINS[stage]
    longest = samples.lengths.reshape(-1, 2).max(axis=1).repeat(2)
    media = int(sum(vision_flops(config.vision, *samples.grids.T, trains).values()).sum())

    def decoder(lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return sum(text_flops(config.text, lengths, targets, trains).values())

    own = decoder(samples.lengths, samples.targets)
    whole = every_pair(text_flops(config.text, longest, longest, trains), longest)
    again = _layers_again(config.text, longest)
    found = {
        USEFUL: own[(samples.patches > 0) | (stage == 2)].sum(),
        "text alone": own.sum(),
        "padding": decoder(longest, samples.targets).sum(),
        "logits of every token": decoder(longest, longest).sum(),
        "masked pairs of attention": whole.sum(),
        "blocks computed again": (whole + again).sum(),
    }
    found = {name: media + int(flops) for name, flops in found.items()}
    done = found["blocks computed again"]
    if stage == 2:
        found["blocks computed again"] += int(_blocks_again(config.vision, samples.grids).sum())
    else:
        through = frozen_tower_flops(config.vision, samples)
        found[FROZEN] = done + through + merger_norm_flops(config.vision, samples)
    return found


def frozen_tower_flops(vision: VisionConfig, samples: Samples) -> int:
    """The part of stage 1's `naive_flops` that is spent on the frozen ViT's backward pass."""
    forward = vision_flops(vision, *samples.grids.T, ())["vision tower"]
    whole = vision_flops(vision, *samples.grids.T, PARTS)["vision tower"]
    again = _blocks_again(vision, samples.grids)
    return int((whole + again - _tower_weights(vision, samples.grids) - forward).sum())


def every_pair(flops: dict[str, np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """Their sum, in which causal attention counts the masked pairs, too."""
    pairs = lengths * (lengths + 1) // 2
    masked = flops["causal attention"] // pairs * (lengths**2 - pairs)
    return sum(flops.values()) + masked


def merger_norm_flops(vision: VisionConfig, samples: Samples) -> int:
    """In stage 1, of the gradient that reaches the merger's first norm through its first map, which
    `vlm.cost` leaves out."""
    joined = vision.hidden_size * vision.merge_unit
    return 2 * joined**2 * int(samples.patches.sum()) // vision.merge_unit


def _layers_again(text: TextConfig, lengths: np.ndarray) -> np.ndarray:
    """Forward once more, but for the last product of a layer: nothing is saved after it, and
    torch stops there."""
    forward = text_flops(text, lengths, lengths, ())
    last = 2 * text.hidden_size * text.intermediate_size * text.num_hidden_layers
    return every_pair(forward, lengths) - forward["head"] - last * lengths


def _blocks_again(vision: VisionConfig, grids: np.ndarray) -> np.ndarray:
    forward = vision_flops(vision, *grids.T, ())["vision tower"]
    last = 2 * vision.hidden_size * vision.intermediate_size * vision.depth
    embedding = 2 * vision.patch_dim * vision.hidden_size
    return forward - (last + embedding) * grids.prod(axis=1)


def _tower_weights(vision: VisionConfig, grids: np.ndarray) -> np.ndarray:
    """Of the gradients of the tower's weights alone."""
    d = vision.hidden_size
    block = 4 * d**2 + 3 * d * vision.intermediate_size
    return 2 * (vision.depth * block + vision.patch_dim * d) * grids.prod(axis=1)


def transformers_model(config: VLMConfig) -> nn.Module:
    """On the meta device, with gradient checkpointing as transformers does it by default."""
    from vlm.hf.configuration_graft_vl import GraftVLConfig  # transformers takes seconds to import
    from vlm.hf.modeling_graft_vl import GraftVLForConditionalGeneration

    vision, text = config.vision, config.text
    rope = {"rope_type": "default", "rope_theta": text.rope_theta}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    tower = ("depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size")
    tower += ("patch_size", "spatial_merge_size", "temporal_patch_size", "window_size")
    described = GraftVLConfig(
        text_config={name: getattr(text, name) for name in names}
        | {"rope_parameters": rope | {"mrope_section": list(text.mrope_section)}},
        vision_config={name: getattr(vision, name) for name in tower}
        | {"fullatt_block_indexes": list(vision.fullatt_block_indexes)},
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
    )
    described._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = GraftVLForConditionalGeneration(described).train()
    model.gradient_checkpointing_enable()
    # grids are read and stay on the CPU; what is made of them must not
    model.model.visual.rotary_pos_emb.register_forward_pre_hook(
        lambda _, inputs: (inputs[0], inputs[1].to("meta"))
    )
    return model


def naive_count(model: nn.Module, samples: Samples, stage: int) -> int:
    """What torch counts for `naive_flops`, with a model of `transformers_model`."""
    model.requires_grad_(stage == 2)
    model.model.visual.merger.requires_grad_(True)
    total = 0
    for first in range(0, len(samples), 2):
        longest = int(samples.lengths[first : first + 2].max())
        grids = samples.grids[np.isin(samples.owners, (first, first + 1))]
        total += count(lambda n=longest, grids=grids: _loss(model, n, grids))
    return total


def _loss(model: nn.Module, longest: int, grids: np.ndarray) -> Tensor:
    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device="meta")

    inputs = {"input_ids": ints(2, longest), "labels": ints(2, longest)}
    inputs["position_ids"] = ints(3, 2, longest)
    if len(grids):
        vision = model.config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        patches = int(grids.prod(axis=1).sum())
        inputs["pixel_values"] = torch.zeros(patches, width, device="meta")
        inputs["image_grid_thw"] = torch.from_numpy(grids)
        # where the images stand follows from values, which there are none
        places = torch.zeros(2, longest, 1, dtype=torch.bool, device="meta")
        model.model.get_placeholder_mask = lambda *_, **__: (places, places)
    return model(**inputs, use_cache=False).loss

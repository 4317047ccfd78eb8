"""transformers' view of an Example: the same tokens and pixels through an exported model.

Legend: t tokens, P patches, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import Batch
from vlm.config import VLMConfig
from vlm.data.collate import collate
from vlm.data.processor import Example
from vlm.model import VisionLanguageModel, packed_attention
from vlm.vision import normalise


def hf_inputs(example: Example, config: VLMConfig, device: torch.device | str = "cpu") -> dict:
    """Keyword arguments of the exported model's forward and generate, batch size 1."""
    ids = example.input_ids[None]
    is_video = ids == config.video_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * is_video.int()
    sizes = [t * h * w for t, h, w in example.grid_thw]
    pixels = dict(enumerate(normalise(example.patches).split(sizes)))
    kinds = media_kinds(example.input_ids, config)
    for kind, values, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [number for number, k in enumerate(kinds) if k == kind]
        if chosen:
            inputs[values] = torch.cat([pixels[number] for number in chosen])
            inputs[grids] = torch.tensor([example.grid_thw[number] for number in chosen])
    if example.second_per_grid:
        inputs["second_per_grid_ts"] = torch.tensor(example.second_per_grid)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def media_kinds(input_ids: Tensor, config: VLMConfig) -> list[str]:
    """`image` or `video` for each medium of a prompt (t,), in order of appearance."""
    starts = (input_ids == config.vision_start_token_id).nonzero().flatten() + 1
    names = {config.image_token_id: "image", config.video_token_id: "video"}
    return [names[int(input_ids[row])] for row in starts]


def our_logits(model: VisionLanguageModel, example: Example) -> Tensor:
    """(t, V) float32 on the CPU."""
    device = model.head_weight.device
    batch: Batch = collate([example], model.config).to(device)
    rows = torch.arange(example.length, device=device)
    with torch.inference_mode():
        hidden = model.decode(batch, packed_attention(batch.segments), rows)
        return F.linear(hidden, model.head_weight).float().cpu()


def hf_logits(model, example: Example, config: VLMConfig) -> Tensor:
    """(t, V) float32 on the CPU."""
    with torch.inference_mode():
        return model(**hf_inputs(example, config, model.device)).logits[0].float().cpu()

"""Part of the proof: transformers' own layers on the donors' tensors, one layer at a time.

The witness shares no code with our towers: its attention is the eager one, with a mask written
out, and it reads the donors' `config.json` by itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)


class TextWitness:
    """Qwen3's hidden states on packed texts; every text is attended to by itself."""

    def __init__(self, raw: dict, x: Tensor, lengths: tuple[int, ...]) -> None:
        """
        Args:
            raw: the language donor's `config.json`.
            x: (T, D) embeddings.
        """
        self.config = Qwen3Config.from_dict(raw.get("text_config", raw))
        self.config._attn_implementation = "eager"
        rotary = Qwen3RotaryEmbedding(self.config)
        self.texts = [text[None] for text in x.split(lengths)]
        self._tables, self._masks = [], []
        for text in self.texts:
            length = text.shape[1]
            self._tables.append(rotary(text, torch.arange(length)[None]))
            self._masks.append(torch.full((length, length), float("-inf")).triu(1)[None, None])

    @property
    def x(self) -> Tensor:
        """(T, D)."""
        return torch.cat(self.texts, dim=1)[0]

    def advance(self, tensors: dict[str, Tensor]) -> None:
        """Through the layer that has these tensors."""
        with torch.device("meta"):
            layer = Qwen3DecoderLayer(self.config, 0)
        layer.load_state_dict(tensors, assign=True)
        inputs = zip(self.texts, self._tables, self._masks, strict=True)
        self.texts = [
            layer(text, attention_mask=mask, position_embeddings=tables)
            for text, tables, mask in inputs
        ]

    def finish(self, weight: Tensor) -> None:
        """Through the final norm."""
        norm = Qwen3RMSNorm(len(weight), self.config.rms_norm_eps)
        norm.load_state_dict({"weight": weight}, assign=True)
        self.texts = [norm(text) for text in self.texts]


def witness_trunk(
    raw: dict,
    pixels: Tensor,
    grids: list[tuple[int, int, int]],
    embedding: Tensor,
    block_tensors: Callable[[int], dict[str, Tensor]],
) -> list[Tensor]:
    """Qwen2.5-VL's features after the patch embedding and after every block, each (P, D).

    Args:
        raw: the `vision_config` of the vision donor.
        pixels: (P, patch_dim) normalised.
        embedding: weight of the patch embedding.
        block_tensors: the tensors of a block, by their names in it.
    """
    config = Qwen2_5_VLVisionConfig.from_dict(raw | {"depth": 1})
    config._attn_implementation = "eager"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    tower.patch_embed.load_state_dict({"proj.weight": embedding}, assign=True)
    tower.merger = nn.Identity()
    # one block in every place, which takes the tensors of each as its turn comes
    block = tower.blocks[0]
    tower.blocks = nn.ModuleList([block] * raw["depth"])
    states: list[Tensor] = []

    def take_tensors(_block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not states:
            states.append(inputs[0])
        block.load_state_dict(block_tensors(len(states) - 1), assign=True)

    block.register_forward_pre_hook(take_tensors)
    block.register_forward_hook(lambda _block, _inputs, output: states.append(output))
    tower(pixels, torch.tensor(grids))
    return states

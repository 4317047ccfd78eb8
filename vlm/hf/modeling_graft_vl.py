"""The hybrid for transformers: Qwen2.5-VL's classes with Qwen3's decoder layers.

Three things differ from the parents. The decoder's layers are Qwen3's (QK-norm, no bias on q, k
and v, head_dim from the config). Text after a video continues at the largest position of any
axis + 1, as in training and in vLLM, where transformers counts height and width alone. And a
video's time axis is rounded in float64, as vLLM does it.

Works on transformers alone, because a copy of this file travels with every exported model.
Tensor names are those of the checkpoint: `model.visual.*`, `model.language_model.*`, `lm_head.*`.
"""

import itertools

import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

from .configuration_graft_vl import GraftVLConfig, GraftVLTextConfig

# The parents' __init__ would build Qwen2.5's layers first, which do not even fit every Qwen3
# size. So each class below starts its grandparent and builds its parts itself.


class GraftVLTextModel(Qwen2_5_VLTextModel):
    """Qwen3's decoder under Qwen2.5-VL's M-RoPE."""

    config: GraftVLTextConfig
    _no_split_modules = ["Qwen3DecoderLayer"]
    _can_record_outputs = {"hidden_states": Qwen3DecoderLayer, "attentions": Qwen3Attention}

    def __init__(self, config: GraftVLTextConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2_5_VLRotaryEmbedding(config=config)
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self._attn_implementation = config._attn_implementation
        self.gradient_checkpointing = False
        self.post_init()


class GraftVLModel(Qwen2_5_VLModel):
    """Vision tower with merger, and the decoder."""

    config: GraftVLConfig
    _no_split_modules = ["Qwen3DecoderLayer", "Qwen2_5_VLVisionBlock"]

    def __init__(self, config: GraftVLConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = GraftVLTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """M-RoPE positions of a padded batch (arXiv:2409.12191, section 2.1).

        Args:
            input_ids: (b, t) int64.
            mm_token_type_ids: (b, t): 0 text, 1 image, 2 video.
            image_grid_thw: (images, 3) in patches, in order of appearance; videos likewise.
            second_per_grid_ts: (videos,): seconds between two temporal grid steps.
            attention_mask: (b, t): 0 for padding.

        Returns:
            (3, b, t) int64 positions, and (b, 1): what to add to a token's index later on.
        """
        grids = {
            1: iter([] if image_grid_thw is None else image_grid_thw.tolist()),
            2: iter([] if video_grid_thw is None else video_grid_thw.tolist()),
        }
        seconds = itertools.repeat(1.0)
        if second_per_grid_ts is not None:
            seconds = iter(torch.as_tensor(second_per_grid_ts).float().tolist())
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.int64, device=input_ids.device)
        deltas = []
        for row, mask in enumerate(kept.bool()):
            kinds = mm_token_type_ids[row][mask].tolist()
            positions = self._positions(kinds, grids, seconds).to(input_ids.device)
            position_ids[:, row, mask] = positions
            deltas.append(int(positions.max()) + 1 - len(kinds))
        return position_ids, torch.tensor(deltas, device=input_ids.device)[:, None]

    def _positions(self, kinds: list[int], grids: dict, seconds) -> torch.Tensor:
        """(3, t) positions of one sample without padding."""
        vision = self.config.vision_config
        blocks, start = [], 0
        for kind, run in itertools.groupby(kinds):
            if kind == 0:
                block = torch.arange(len(list(run))).expand(3, -1)
            else:
                t, h, w = next(grids[kind])
                interval = vision.tokens_per_second * next(seconds) if kind == 2 else 1
                time = (torch.arange(t, dtype=torch.float64) * interval).long()
                rows = torch.arange(h // vision.spatial_merge_size)
                columns = torch.arange(w // vision.spatial_merge_size)
                block = torch.stack(torch.meshgrid(time, rows, columns, indexing="ij")).flatten(1)
            blocks.append(block + start)
            start = int(blocks[-1].max()) + 1
        return torch.cat(blocks, dim=1)


class GraftVLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """The hybrid with its head."""

    config: GraftVLConfig
    _no_split_modules = GraftVLModel._no_split_modules

    def __init__(self, config: GraftVLConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        text = config.text_config
        self.model = GraftVLModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


__all__ = ["GraftVLForConditionalGeneration", "GraftVLModel", "GraftVLTextModel"]

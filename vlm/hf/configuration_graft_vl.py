"""Config of the hybrid: Qwen2.5-VL's vision tower and merger on a Qwen3 decoder.

Works on transformers alone, because a copy of this file travels with every exported model.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)


@strict
class GraftVLTextConfig(Qwen2_5_VLTextConfig):
    """Qwen3's decoder: a head_dim of its own, no bias on q, k and v, QK-norm.

    The parent's M-RoPE stays (`rope_parameters.mrope_section`).
    """

    model_type = "graft_vl_text"
    # what Qwen3 has besides; without these two a sharded q_norm would see half a head
    base_model_tp_plan = Qwen2_5_VLTextConfig.base_model_tp_plan | {
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }

    head_dim: int = 128
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


@strict
class GraftVLConfig(Qwen2_5_VLConfig):
    """Vision tower, decoder, and the ids of the media tokens."""

    model_type = "graft_vl"
    sub_configs = {"vision_config": Qwen2_5_VLVisionConfig, "text_config": GraftVLTextConfig}


__all__ = ["GraftVLConfig", "GraftVLTextConfig"]

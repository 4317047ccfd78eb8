"""The hybrid in vLLM: its Qwen2.5-VL with its Qwen3 as the decoder.

Images, videos, prefix caching, chunked prefill, tensor parallelism and the rest are vLLM's own.
vLLM's Qwen2.5-VL hard-codes a Qwen2 decoder, and its Qwen3 takes up M-RoPE by itself from
`rope_parameters.mrope_section`. Only vLLM imports this file (`vlm/vllm_plugin.py`).
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.layers.fusion.mm_input_norm import build_mm_input_norm
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionTransformer,
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY


class GraftVLMultiModalProcessor(Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor, but for two things about videos.

    vLLM samples frames as it decodes them, so that the exported processor, which samples for users
    of transformers, must not do it again. And vLLM casts all that a processor returns to the
    model's dtype: rounded to bfloat16, the seconds between frames would move the time axis.
    """

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        if not hf_data.get("videos"):
            return super()._call_hf_processor(hf_data, hf_kwargs)
        videos = {**(hf_kwargs.get("videos_kwargs") or {}), "do_sample_frames": False}
        output = super()._call_hf_processor(hf_data, {**hf_kwargs, "videos_kwargs": videos})
        patch = self.info.get_hf_config().vision_config.temporal_patch_size
        seconds = [patch / metadata.sampled_fps for metadata in hf_data["video_metadata"]]
        output["second_per_grid_ts"] = torch.tensor(seconds)
        return output


@MULTIMODAL_REGISTRY.register_processor(
    GraftVLMultiModalProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class GraftVLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Built as the parent builds itself, but for the decoder's architecture."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        multimodal = vllm_config.model_config.get_multimodal_config()
        self.config, self.vllm_config = config, vllm_config
        self.model_config, self.multimodal_config = vllm_config.model_config, multimodal
        self.use_data_parallel = multimodal.mm_encoder_tp_mode == "data"
        self.video_pruning_rate = multimodal.video_pruning_rate
        self.is_multimodal_pruning_enabled = multimodal.is_multimodal_pruning_enabled()
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.visual = Qwen2_5_VisionTransformer(
                vision_config=config.vision_config,
                norm_eps=1e-6,
                quant_config=self.quant_config,
                input_norm=build_mm_input_norm(self.model_config),
                prefix=maybe_prefix(prefix, "visual"),
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["Qwen3ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

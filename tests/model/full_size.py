"""The config of Qwen2.5-VL-7B's tower under Qwen3-8B."""

from vlm.config import TextConfig, VisionConfig, VLMConfig

EIGHT_BILLION = VLMConfig(
    VisionConfig(32, 1280, 16, 3420, 4096, (7, 15, 23, 31)),
    TextConfig(151936, 4096, 12288, 36, 32, 8, 128, 1e6, mrope_section=(16, 24, 24)),
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
)

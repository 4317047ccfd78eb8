"""Limits on images and videos in transformers' and vLLM's words."""

from pathlib import Path

from vlm.data.limits import Limits
from vlm.hf_config import ConfigError, read_json


def image_size(limits: Limits) -> dict[str, int]:
    """transformers' `size` of an image."""
    return {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}


def frame_size(limits: Limits) -> dict[str, int]:
    """transformers' `size` of a video's frame; its own least would lie above the recipe's most."""
    return {"shortest_edge": limits.video_min_pixels, "longest_edge": limits.video_max_pixels}


def frame_sampling(limits: Limits) -> dict[str, float]:
    """Which frames of a video are seen, for transformers' processor and for vLLM's loader."""
    least, most = limits.frames
    return {"fps": limits.fps, "min_frames": least, "max_frames": most}


def vllm_arguments(limits: Limits, images: int, videos: int) -> dict[str, dict]:
    """vLLM's arguments of these names; `images`, `videos`: most of them in a request."""
    return {
        "limit_mm_per_prompt": {"image": images, "video": videos},
        "mm_processor_kwargs": {
            "images_kwargs": {"size": image_size(limits)},
            "videos_kwargs": {"size": frame_size(limits)},
        },
        # -1: of a list of frames every one, where vLLM would take 32
        "media_io_kwargs": {"video": frame_sampling(limits) | {"num_frames": -1}},
    }


def read_limits(folder: Path) -> Limits:
    """The limits that an export carries."""
    image = read_json(folder / "preprocessor_config.json")
    video = read_json(folder / "video_preprocessor_config.json")
    try:
        return Limits(
            min_pixels=image["size"]["shortest_edge"],
            max_pixels=image["size"]["longest_edge"],
            video_min_pixels=video["size"]["shortest_edge"],
            video_max_pixels=video["size"]["longest_edge"],
            fps=video["fps"],
            fps_max_frames=video["max_frames"],
        )
    except KeyError as error:
        raise ConfigError(
            f"{folder}: the processor's settings have no {error}; make it with serve/export.py"
        ) from None

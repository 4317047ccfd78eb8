"""How large images and videos may become, for every reader of an export."""

from dataclasses import dataclass
from pathlib import Path

from vlm.data.processor import (
    FPS,
    FPS_MAX_FRAMES,
    FPS_MIN_FRAMES,
    MAX_PIXELS,
    MIN_PIXELS,
    VIDEO_MAX_PIXELS,
    VIDEO_MIN_PIXELS,
)
from vlm.hf_config import ConfigError, read_json


@dataclass(frozen=True)
class Limits:
    """Options of `vlm.data.processor.Processor`, by the same names; the recipe's by default."""

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    video_min_pixels: int = VIDEO_MIN_PIXELS
    video_max_pixels: int = VIDEO_MAX_PIXELS
    """Of one frame."""
    fps: float = FPS
    """Frames sampled per second of video."""
    fps_max_frames: int = FPS_MAX_FRAMES

    @property
    def image_size(self) -> dict[str, int]:
        """In transformers' words, which vLLM shares."""
        return {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

    @property
    def video_size(self) -> dict[str, int]:
        """Of one frame; transformers' own least would lie above the recipe's most."""
        return {"shortest_edge": self.video_min_pixels, "longest_edge": self.video_max_pixels}

    @property
    def sampling(self) -> dict[str, float]:
        """Which frames of a video are seen, in transformers' words, which vLLM shares."""
        return {
            "fps": self.fps,
            "min_frames": min(FPS_MIN_FRAMES, self.fps_max_frames),
            "max_frames": self.fps_max_frames,
        }


def vllm_arguments(limits: Limits, images: int, videos: int) -> dict[str, dict]:
    """vLLM's arguments of these names.

    Args:
        images, videos: most of them in a request.
    """
    return {
        "limit_mm_per_prompt": {"image": images, "video": videos},
        "mm_processor_kwargs": {
            "images_kwargs": {"size": limits.image_size},
            "videos_kwargs": {"size": limits.video_size},
        },
        "media_io_kwargs": {"video": limits.sampling},
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

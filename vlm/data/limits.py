"""How large images and videos may become: one set of limits for training, chat, export and server.

The defaults are the recipe's, and its environment variables set some of them.
"""

import os
from dataclasses import dataclass, fields

ENVIRONMENT = {
    "MAX_PIXELS": "max_pixels",
    "VIDEO_MAX_PIXELS": "video_max_pixels",
    "FPS_MAX_FRAMES": "fps_max_frames",
}
"""Variables of the recipe, and the limit that each sets where nothing else does."""
FPS_MIN_FRAMES = 4
"""Least frames sampled of a video, as far as it has them."""
MOST_FPS, MOST_FRAMES = 30, 768
"""A vLLM server samples no more, whatever it is asked for."""


@dataclass(frozen=True)
class Limits:
    """ValueError where they contradict each other, or a server could not keep to them."""

    min_pixels: int = 3136
    """Of an image, after resizing."""
    max_pixels: int = 1003520
    video_min_pixels: int = 12544
    """Of each frame, after resizing."""
    video_max_pixels: int = 50176
    fps: float = 2.0
    """Frames sampled per second of video."""
    fps_max_frames: int = 12
    """Most frames sampled of a video."""

    def __post_init__(self) -> None:
        for kind in ("", "video_"):
            least, most = getattr(self, f"{kind}min_pixels"), getattr(self, f"{kind}max_pixels")
            if least < 1:
                raise ValueError(f"{kind}min_pixels is {least}; it must be above 0")
            if least > most:
                raise ValueError(f"{kind}max_pixels {most} is below {kind}min_pixels {least}")
        if not 0 < self.fps <= MOST_FPS:
            raise ValueError(f"fps is {self.fps}; it must be above 0 and at most {MOST_FPS}")
        if not 2 <= self.fps_max_frames <= MOST_FRAMES:
            raise ValueError(
                f"fps_max_frames is {self.fps_max_frames}; it must be in 2..{MOST_FRAMES}"
            )

    @classmethod
    def of(cls, options: object) -> "Limits":
        """Those that are attributes of some options, by the same names; defaults for the rest."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: getattr(options, name) for name in names if hasattr(options, name)})

    @property
    def image_pixels(self) -> tuple[int, int]:
        """Least and most of an image."""
        return self.min_pixels, self.max_pixels

    @property
    def frame_pixels(self) -> tuple[int, int]:
        """Least and most of a video's frame."""
        return self.video_min_pixels, self.video_max_pixels

    @property
    def frames(self) -> tuple[int, int]:
        """Least and most frames sampled of a video."""
        return min(FPS_MIN_FRAMES, self.fps_max_frames), self.fps_max_frames


def environment_limits() -> dict[str, int]:
    """Limits that the environment sets; ValueError where one is not a number."""
    limits = {}
    for variable, name in ENVIRONMENT.items():
        if variable in os.environ:
            try:
                limits[name] = int(os.environ[variable])
            except ValueError:
                raise ValueError(f"{variable}={os.environ[variable]!r} is not a number") from None
    return limits

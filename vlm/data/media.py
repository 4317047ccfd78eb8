"""A sample's images and videos: their grids from headers alone, and their patches.

Nothing here depends on text; `vlm/data/image.py` and `vlm/data/video.py` read the files.
"""

import re
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm.batch import Features
from vlm.config import VisionConfig
from vlm.data.image import (
    BadImage,
    describe,
    header_size,
    load_image,
    patchify,
    resize,
    smart_resize,
)
from vlm.data.limits import Limits
from vlm.data.schema import IMAGE_TAG, VIDEO_TAG, BadSample, Media, Sample, Video
from vlm.data.video import (
    BadVideo,
    VideoInfo,
    describe_video,
    load_frames,
    sample_indices,
    seconds_per_grid,
    video_info,
)

if TYPE_CHECKING:
    from vlm.data.features import FeatureCache

TAGS = re.compile(f"{IMAGE_TAG}|{VIDEO_TAG}")
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Medium:
    """An image or a video, and what the model will see of it."""

    source: Video
    grid: Grid
    """(time, height, width) in patches."""
    info: VideoInfo | None = None
    """A video's header; None for an image, which has no time."""
    frames: tuple[int, ...] = ()
    """Numbers of a video's sampled frames."""
    seconds: float | None = None
    """Seconds from one temporal patch of a video to the next."""


@dataclass(frozen=True)
class MediaReader:
    """Reads media within limits."""

    vision: VisionConfig
    limits: Limits

    def measure(self, sample: Sample) -> list[Medium]:
        """Images and videos in order of appearance, from headers; BadSample names a bad one."""
        images, videos = iter(sample.images), iter(sample.videos)
        tags = [tag for message in sample.messages for tag in TAGS.findall(message.content)]
        try:
            return [
                self._image(next(images)) if tag == IMAGE_TAG else self._video(next(videos))
                for tag in tags
            ]
        except (BadImage, BadVideo) as error:
            raise BadSample(sample.id, str(error)) from None

    def read(
        self, sample: Sample, exact: bool = False, cache: "FeatureCache | None" = None
    ) -> tuple[list[Medium], Tensor, Features | None]:
        """The media, decoded: patches (P, patch_dim) uint8 of all in order of appearance.

        The media are those of `measure`, but for videos with frames that cannot be decoded: they
        are shorter.

        Args:
            exact: a shorter video is bad, since a run is planned by what was measured.
            cache: media that it knows are not decoded, but given as features.
        """
        media, patches = [], [torch.zeros(0, self.vision.patch_dim, dtype=torch.uint8)]
        rows, told = [cache.none()] if cache else [], []
        for medium in self.measure(sample):
            try:
                if cache:
                    count = prod(medium.grid)
                    key = cache.key(medium.source, (medium.grid, medium.frames))
                    found = cache.get(key, count)
                    told.append((count, key if found is None else None))
                    if found is not None:
                        media.append(medium)
                        rows.append(found)
                        continue
                decoded, pixels = self._decode(medium)
            except (BadImage, BadVideo) as error:
                raise BadSample(sample.id, str(error)) from None
            if exact and decoded.grid != medium.grid:
                raise BadSample(
                    sample.id,
                    "has a video of which fewer frames can be decoded than its header tells",
                )
            media.append(decoded)
            patches.append(patchify(pixels, self.vision))
        features = Features(torch.cat(rows), tuple(told)) if cache else None
        return media, torch.cat(patches), features

    def _image(self, source: Media) -> Medium:
        size = self._target_size(*header_size(source), self.limits.image_pixels)
        return Medium(source, self._grid(1, *size))

    def _video(self, source: Video) -> Medium:
        info = video_info(source, self.limits.fps)
        frames = self.frames_seen(source, info)
        size = self._target_size(info.height, info.width, self.limits.frame_pixels)
        medium = Medium(source, self._grid(len(frames), *size), info, tuple(frames))
        return replace(medium, seconds=self._seconds(medium, len(frames)))

    def frames_seen(self, source: Video, info: VideoInfo) -> list[int]:
        """Numbers of a video's frames that the model sees.

        A list of frames is sampled already. One that is too long is refused and not thinned out,
        since a server would take it whole.
        """
        if not isinstance(source, tuple):
            patch = self.vision.temporal_patch_size
            return sample_indices(info, self.limits.fps, *self.limits.frames, patch)
        if len(source) > self.limits.fps_max_frames:
            raise BadVideo(
                f"{describe_video(source)} has {len(source)} frames, more than fps_max_frames "
                f"{self.limits.fps_max_frames}; take fewer"
            )
        return list(range(len(source)))

    def _decode(self, medium: Medium) -> tuple[Medium, Tensor]:
        """The medium as its file really holds it, and pixels: (h, w, 3) or (frames, h, w, 3)."""
        side = self.vision.patch_size
        size = (medium.grid[1] * side, medium.grid[2] * side)
        if medium.info is None:
            pixels = load_image(medium.source)
            if self._target_size(*pixels.shape[:2], self.limits.image_pixels) != size:
                raise BadImage(f"{describe(medium.source)} has a header that lies of its size")
            return medium, resize(pixels, *size)
        pixels = load_frames(medium.source, medium.frames, *size)
        count = len(pixels)
        seconds = self._seconds(medium, count)
        return replace(medium, grid=self._grid(count, *size), seconds=seconds), pixels

    def _seconds(self, medium: Medium, frames: int) -> float:
        return seconds_per_grid(frames, medium.info, self.vision.temporal_patch_size)

    def _grid(self, frames: int, height: int, width: int) -> Grid:
        side, depth = self.vision.patch_size, self.vision.temporal_patch_size
        return -(-frames // depth), height // side, width // side

    def _target_size(self, height: int, width: int, pixels: tuple[int, int]) -> tuple[int, int]:
        factor = self.vision.patch_size * self.vision.spatial_merge_size
        return smart_resize(height, width, *pixels, factor)

"""Video: which frames are seen, at what time, and their pixels.

Decoded with OpenCV's FFmpeg and sampled as vLLM's `qwen2_vl` loader does it (0.32,
`multimodal/video.py` and `video_decoders/opencv.py`), so that a model learns from the very frames
that a server will show it. OpenCV is imported when the first video is met, and not before.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.data.image import (
    MAX_SOURCE_PIXELS,
    check_regular,
    describe,
    header_size,
    load_image,
    resize,
)
from vlm.data.schema import Media, Video


class BadVideo(ValueError):
    """A video that cannot be used, and why."""


class VideoInfo(NamedTuple):
    """A video's header; height and width are those of the upright frame."""

    frames: int
    fps: float
    height: int
    width: int


def video_info(source: Video, fps: float) -> VideoInfo:
    """The header of a video; frames are not kept. BadVideo names the file and the reason.

    Args:
        fps: the frame rate of a list of frames, which has none of its own.
    """
    if isinstance(source, tuple):
        return _list_info(source, fps)
    with _opened(source) as capture:
        info = _read_header(capture)
    name = describe_video(source)
    if not info.fps > 0:
        raise BadVideo(f"{name} has no known frame rate")
    if info.frames < 2:
        frames = max(info.frames, 0)
        raise BadVideo(f"{name} has {frames} frames by its header; a video has two or more")
    if not 0 < info.height * info.width <= MAX_SOURCE_PIXELS:
        raise BadVideo(
            f"{name} has frames of {info.width} x {info.height} pixels, which cannot be decoded"
        )
    return info


def sample_indices(
    info: VideoInfo, fps: float, min_frames: int, max_frames: int, temporal_patch_size: int
) -> list[int]:
    """Rising numbers of the frames that are seen: `fps` a second, evenly spread.

    At least `min_frames` and at most `max_frames` of them, as far as there are any, in whole
    temporal patches; float32 sometimes rounds to one more. vLLM's and transformers' rule
    (`Qwen2VLVideoProcessor.sample_frames`), to the last bit.
    """
    most = min(max_frames, info.frames) // temporal_patch_size * temporal_patch_size
    count = min(max(info.frames / info.fps * fps, min_frames), most)
    count = math.floor(count / temporal_patch_size) * temporal_patch_size
    indices = torch.arange(0, info.frames, info.frames / count).int()  # float32 decides some
    return indices.clamp(max=info.frames - 1).unique().tolist()


def load_frames(source: Video, indices: Sequence[int], height: int, width: int) -> Tensor:
    """(n, height, width, 3) uint8 RGB: frames of rising numbers, upright and resized.

    Each frame is resized when it is decoded, so that a long video of large frames fits. Frames of
    a damaged file that cannot be decoded are left out, as vLLM does: n may be below
    `len(indices)`. BadVideo where none is left.
    """
    if isinstance(source, tuple):
        loaded = (_load_frame(source[index]) for index in indices)
    else:
        loaded = _decode(source, indices)
    frames = [resize(frame, height, width) for frame in loaded]
    if not frames:
        raise BadVideo(f"{describe_video(source)} is damaged: not one frame can be decoded")
    return torch.stack(frames)


def seconds_per_grid(sampled: int, info: VideoInfo, temporal_patch_size: int) -> float:
    """Seconds from one temporal patch to the next, in float32.

    By the average rate of the sampled frames (transformers' `VideoMetadata.sampled_fps`).
    """
    sampled_fps = sampled / info.frames * info.fps
    return torch.tensor(temporal_patch_size / sampled_fps, dtype=torch.float32).item()


def describe_video(source: Video) -> str:
    if isinstance(source, tuple):
        return f"a list of {len(source)} frames"
    return describe(source, "a video")


def _list_info(frames: tuple[Media, ...], fps: float) -> VideoInfo:
    if len(frames) < 2:
        raise BadVideo(f"{describe_video(frames)} is no video, which has two or more")
    sizes = [header_size(frame) for frame in frames]
    for frame, size in zip(frames, sizes, strict=True):
        if size != sizes[0]:
            (height, width), (h, w) = sizes[0], size
            raise BadVideo(
                f"{describe(frame)} is {w} x {h}, the frames before it {width} x {height}"
            )
    return VideoInfo(len(frames), fps, *sizes[0])


def _load_frame(frame: Media) -> Tensor:
    pixels = load_image(frame)
    if tuple(pixels.shape[:2]) != header_size(frame):
        raise BadVideo(f"{describe(frame)} has a header that lies of its size")
    return pixels


@contextmanager
def _opened(source: Media) -> Iterator:
    """A `cv2.VideoCapture`, reading a stream as vLLM's does: paths and bytes decode alike."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read at import; BadVideo says
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what is wrong, and of which file
    import cv2

    name = describe_video(source)
    # Workers share the machine; and what several threads make of a damaged file is left to chance.
    one_thread = [cv2.CAP_PROP_N_THREADS, 1]
    try:
        check_regular(source)
        stream = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except FileNotFoundError:
        raise BadVideo(f"{name} does not exist") from None
    except IsADirectoryError:
        raise BadVideo(f"{name} is a directory") from None
    except (OSError, ValueError) as error:
        raise BadVideo(f"{name} cannot be opened ({error})") from None
    with stream:
        capture = cv2.VideoCapture(stream, cv2.CAP_FFMPEG, one_thread)
        if not capture.isOpened():
            raise BadVideo(f"{name} is not a video that can be read, or is cut off")
        try:
            yield capture
        except cv2.error as error:
            raise BadVideo(f"{name} is damaged ({error})") from None
        finally:
            capture.release()


def _read_header(capture) -> VideoInfo:
    import cv2

    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    # The header also counts frames that an edit list hides (a clip cut out without re-encoding).
    # A seek to the end tells how many are shown, where it really gets there.
    if frames > 0 and capture.set(cv2.CAP_PROP_POS_AVI_RATIO, 1.0):
        shown = int(capture.get(cv2.CAP_PROP_POS_FRAMES))
        ended = not capture.grab()
        capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        if ended and 0 < shown < frames - 1:
            frames = shown
    height, width = (
        int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH)
    )
    return VideoInfo(frames, capture.get(cv2.CAP_PROP_FPS), height, width)


def _decode(source: Media, indices: Sequence[int]) -> Iterator[Tensor]:
    """(h, w, 3) uint8 RGB of each frame that can be decoded, one after the other."""
    wanted = set(indices)
    with _opened(source) as capture:
        info = _read_header(capture)  # its seeks and all: they may decide where decoding begins
        for index in range(indices[-1] + 1):
            if not capture.grab() or index not in wanted:
                continue
            decoded, frame = capture.retrieve()
            if not decoded:
                continue
            if frame.shape != (info.height, info.width, 3):
                raise BadVideo(f"{describe_video(source)} has a header that lies of its size")
            yield torch.from_numpy(frame[..., ::-1].copy())  # BGR to RGB

"""Small videos for these tests, and witnesses of what a model should see of them."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

from serve.vllm_env import vllm_environment

LIMITS = [(2.0, 12), (1.0, 5), (2.5, 64)]
"""(fps, fps_max_frames)."""
CLIPS = {  # frames, height, width, fps, codec
    "landscape.mp4": (30, 50, 66, 25, "mp4v"),
    "portrait.mp4": (60, 120, 50, 30000 / 1001, "mp4v"),
    "two.avi": (2, 64, 64, 10, "MJPG"),
    "three.mp4": (3, 64, 64, 10, "mp4v"),
    "five.avi": (5, 90, 40, 7.5, "MJPG"),
    "long.mp4": (451, 36, 40, 30, "mp4v"),  # with 64 frames its time is longer than its sides
    "large.avi": (40, 480, 640, 3.7, "MJPG"),
    "sharp.avi": (20, 60, 92, 12.5, "FFV1"),
}
UNUSUAL = ("turned.mp4", "edited.mp4", "holed.avi", "cut.avi")
"""Turned and cut out by metadata; damaged."""
ORACLE = """
import json, sys
import cv2, numpy as np
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

def everything(path):
    capture, frames = cv2.VideoCapture(path), []
    fps = capture.get(cv2.CAP_PROP_FPS)
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames), VideoMetadata(total_num_frames=len(frames), fps=fps)

def from_vllm(path):
    from vllm.multimodal.video import Qwen2VLVideoBackend
    frames, metadata = Qwen2VLVideoBackend.load_bytes(
        open(path, "rb").read(), num_frames=32, fps=fps, max_frames=most, min_frames=4)
    del metadata["do_sample_frames"]
    return frames, VideoMetadata(**metadata)

paths, limits, from_server, out = json.loads(sys.argv[1])
size = {"shortest_edge": 12544, "longest_edge": 50176}
found = {}
for path in paths:
    for number, (fps, most) in enumerate(limits):
        frames, metadata = (from_vllm if from_server else everything)(path)
        done = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)(
            videos=[frames], video_metadata=[metadata], do_sample_frames=not from_server, fps=fps,
            min_frames=4, max_frames=most, return_metadata=True, return_tensors="pt")
        metadata = done["video_metadata"][0]
        for key, value in {
            "pixels": done["pixel_values_videos"], "grid": done["video_grid_thw"][0],
            "indices": metadata.frames_indices, "seconds": np.float32(2 / metadata.sampled_fps),
        }.items():
            found[f"{path} {number} {key}"] = np.array(value)
np.savez(out, **found)
"""
HAS_VLLM = importlib.util.find_spec("vllm") is not None


def write_video(path: Path, frames, height, width, fps, codec="mp4v", seed=0) -> str:
    """A moving noisy pattern; returns the file's name."""
    import cv2

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    assert writer.isOpened()
    for number in range(frames):
        frame = np.roll(picture, (3 * number, 5 * number), (0, 1)).copy()
        frame[: number * 7 % height + 1, :5] = number * 9 % 256
        writer.write(frame)
    writer.release()
    return path.name


def write_clips(folder: Path) -> Path:
    """All of CLIPS and UNUSUAL; returns the folder."""
    for seed, (name, clip) in enumerate(CLIPS.items()):
        write_video(folder / name, *clip, seed=seed)
    content = (folder / "landscape.mp4").read_bytes()
    place = content.index(b"tkhd") + 44  # the matrix: a quarter turn
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (folder / "turned.mp4").write_bytes(content[:place] + turned + content[place + 36 :])
    place = content.index(b"elst") + 12  # the edit list: 600 ms from 5120 / 12800 s on
    edit = struct.pack(">Ii", 600, 5120)
    (folder / "edited.mp4").write_bytes(content[:place] + edit + content[place + 8 :])
    content = (folder / "large.avi").read_bytes()
    third = len(content) // 3
    (folder / "holed.avi").write_bytes(content[:third] + bytes(third) + content[2 * third :])
    (folder / "cut.avi").write_bytes(content[: 2 * third])
    return folder


def ask(folder: Path, names, from_server: bool) -> dict[str, np.ndarray]:
    """`path limit key` -> what transformers (or vLLM and transformers) make of each file."""
    out = folder / f"oracle{from_server:d}.npz"
    argument = json.dumps([[str(folder / n) for n in names], LIMITS, from_server, str(out)])
    command = [sys.executable, "-c", ORACLE, argument]
    environment = os.environ | vllm_environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))

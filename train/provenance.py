"""What is running: command, versions, revision, device. The log's `start` events hold it."""

import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from train.world import World

ROOT = Path(__file__).parents[1]
PACKAGES = ("graftvl", "torch", "deepspeed", "flash-attn", "safetensors", "tokenizers", "numpy")
PACKAGES += ("pillow", "opencv-python-headless")
"""Whose versions may change a number; one that is not installed is left out."""


def provenance(world: World) -> dict:
    """What is running, as plain values."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(world),
        "ranks": world.size,
        "device": device_name(world),
        "versions": _versions(),
        "revision": _revision(),
    }


def device_name(world: World) -> str:
    cuda = world.device.type == "cuda"
    return torch.cuda.get_device_name(world.device) if cuda else world.device.type


def _command(world: World) -> str:
    """As it may be typed again; of several nodes the first one's, of which the others differ in
    `--node_rank` alone."""
    launcher = ["python"]
    if world.launched:
        here = os.environ
        launcher = ["torchrun", "--nproc_per_node", here["LOCAL_WORLD_SIZE"]]
        if int(here["LOCAL_WORLD_SIZE"]) < world.size:
            launcher += ["--nnodes", here["GROUP_WORLD_SIZE"], "--node_rank", here["GROUP_RANK"]]
            launcher += ["--master_addr", here["MASTER_ADDR"], "--master_port", here["MASTER_PORT"]]
    return shlex.join([*launcher, *sys.argv])


def _versions() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _revision() -> str | None:
    """Of the code, `-dirty` where a file differs from it; None for code without git."""
    if not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

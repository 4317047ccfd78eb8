"""The training state of the ranks on disk: written by each alone, read back by any number.

A file holds one rank's fragments of float32 masters and moments, each named
`parameter|kind|start`, so that no conversion, communication or pickle is needed, and the rank's
random state.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from train.config import UsageError
from train.engine import Engine, Fragment
from vlm.tensor_file import NAMES, make_header


def fragments_of(engine: Engine) -> list[tuple[str, Tensor]]:
    """Key and values of each."""
    return [(f"{f.parameter}|{f.kind}|{f.start}", f.values) for f in engine.fragments()]


def rank_file(folder: Path, rank: int) -> Path:
    """Of a rank, in a checkpoint."""
    return folder / "engine" / f"rank-{rank:05d}.safetensors"


def random_state() -> dict[str, Tensor]:
    state = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of contiguous tensors in the host's memory, on the disk at return.

    The library's own `save_file` copies all values first, and keeps the interpreter meanwhile.
    """
    # wide values first: a mapped file holds none off its alignment
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    with path.open("wb") as file:
        file.write(make_header([(name, NAMES[t.dtype], tuple(t.shape)) for name, t in ordered]))
        for _, tensor in ordered:
            file.write(memoryview(tensor.view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def restore_engine(folder: Path, engine: Engine, updates: int, rank: int) -> None:
    """Fill the engine's fragments from a checkpoint that any number of ranks wrote.

    Raises UsageError where the checkpoint does not hold all of a parameter.
    """
    stored = _StoredFragments(folder / "engine")
    for fragment in engine.fragments():
        stored.read_into(fragment)
    engine.restored(updates)
    own = rank_file(folder, rank)
    if own.exists():
        with safe_open(own, framework="pt") as file:
            torch.set_rng_state(file.get_tensor("rng"))
            if torch.cuda.is_available() and "cuda_rng" in file.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(file.get_tensor("cuda_rng"))


class _StoredFragments:
    """Fragments on disk by parameter and kind, whichever rank wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[tuple[str, str], list[tuple[int, int, object, str]]] = defaultdict(list)
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a dict
                if "|" not in key:
                    continue
                parameter, kind, start = key.split("|")
                (length,) = file.get_slice(key).get_shape()
                self.pieces[parameter, kind].append((int(start), length, file, key))

    def read_into(self, wanted: Fragment) -> None:
        begin, end = wanted.start, wanted.start + len(wanted.values)
        covered = 0
        for start, length, file, key in self.pieces[wanted.parameter, wanted.kind]:
            low, high = max(begin, start), min(end, start + length)
            if low < high:
                piece = file.get_slice(key)[low - start : high - start]
                wanted.values[low - begin : high - begin].copy_(piece)
                covered += high - low
        if covered != end - begin:
            raise UsageError(
                f"{self.folder} holds {covered} of {end - begin} values of {wanted.parameter} "
                f"({wanted.kind}); was it written with other freeze options?"
            )

"""The training state of the ranks on disk: written by each alone, read back by any number.

A file holds one rank's fragments of float32 masters and moments, each named
`parameter|kind|start`, so that no conversion, communication or pickle is needed, and the rank's
random state.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from train.config import UsageError
from train.engine import MOMENTS, Engine, Fragment
from train.freeze import Group
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


def check_fragments(folder: Path, groups: Iterable[Group]) -> None:
    """UsageError where a checkpoint does not hold all that the training of these needs."""
    stored = _StoredFragments(folder / "engine")
    for name, parameter in (pair for group in groups for pair in group.parameters.items()):
        for kind in ("master", *MOMENTS):
            stored.check(name, kind, parameter.numel())


def restore_engine(folder: Path, engine: Engine, updates: int, rank: int) -> None:
    """Fill the engine's fragments from a checkpoint that any number of ranks wrote, and that
    `check_fragments` has accepted."""
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
        self.pieces: dict[tuple[str, str], list[tuple[int, int, object, str]]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a dict
                if "|" not in key:
                    continue
                parameter, kind, start = key.split("|")
                (length,) = file.get_slice(key).get_shape()
                pieces = self.pieces.setdefault((parameter, kind), [])
                pieces.append((int(start), length, file, key))

    def check(self, parameter: str, kind: str, size: int) -> None:
        """UsageError unless its fragments are the whole of a parameter of so many values."""
        covered = 0
        for start, length in sorted(piece[:2] for piece in self.pieces.get((parameter, kind), ())):
            if start == covered:
                covered += length
        if covered != size:
            raise UsageError(
                f"{self.folder} holds {covered} of {size} values of {parameter} ({kind}); was it "
                "written with other freeze options?"
            )

    def read_into(self, wanted: Fragment) -> None:
        begin, end = wanted.start, wanted.start + len(wanted.values)
        for start, length, file, key in self.pieces[wanted.parameter, wanted.kind]:
            low, high = max(begin, start), min(end, start + length)
            if low < high:
                piece = file.get_slice(key)[low - start : high - start]
                wanted.values[low - begin : high - begin].copy_(piece)

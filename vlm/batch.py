"""What the model eats: one packed micro-batch, no padding and no batch axis.

Everything here is computed by the data worker (`vlm/data/collate.py`), so that the model
never has to read a tensor's value on the host: boundaries of every packed sequence are
carried both as a tensor and as Python integers.

Legend: T tokens, S samples, N target tokens, P patches, V visual tokens (P / 4).
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Boundaries of the segments of a packed sequence."""

    cu_seqlens: Tensor
    """(S + 1,) int32: 0, then the running sum of the lengths."""
    lengths: tuple[int, ...]
    """The same as Python integers."""

    @classmethod
    def of(cls, lengths: tuple[int, ...] | list[int]) -> "Segments":
        return cls(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), tuple(lengths))

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def by_length(self) -> tuple[list[tuple[int, Tensor | None]], Tensor | None]:
        """Segments of equal length together, for one batched call per length.

        Returns:
            `[(length, rows)]`, rows (n * length,) int64 or None for "all, in order", and the
            permutation that puts the concatenated groups back (None where it is the identity).
        """
        starts: dict[int, list[int]] = {}
        for start, length in zip(accumulate((0, *self.lengths[:-1])), self.lengths, strict=True):
            starts.setdefault(length, []).append(start)
        if len(starts) == 1:
            return [(self.lengths[0], None)], None
        # in numpy: a torch.Tensor that is looked at may be one that the host must wait for
        rows = [(np.array(first)[:, None] + np.arange(n)).ravel() for n, first in starts.items()]
        order = np.concatenate(rows)
        in_place = np.array_equal(order, np.arange(len(order)))
        groups = list(zip(starts, map(self._on_device, rows), strict=True))
        return groups, None if in_place else self._on_device(np.argsort(order))

    def _on_device(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.cu_seqlens.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Segments":
        return _each(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        return _each(self, lambda x: x.pin_memory())


@dataclass(frozen=True)
class VisionPlan:
    """How the tower walks through its patches (`vlm.vision.plan_vision`)."""

    window_index: Tensor
    """(V,) int64: visual tokens in the order of their windows."""
    reverse_index: Tensor
    """(V,) int64: the inverse permutation."""
    positions: Tensor
    """(P, 2) int64: row and column of each patch, in window order."""
    windows: Segments
    """Attention windows, over patches in window order."""
    frames: Segments
    """Temporal frames, over the same patches (a window never leaves its frame)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VisionPlan":
        return _each(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "VisionPlan":
        return _each(self, lambda x: x.pin_memory())


@dataclass(frozen=True)
class Features:
    """Which images and videos a frozen tower need not see, since its output is on disk
    (`vlm/data/features.py`)."""

    rows: Tensor
    """(F, D): what the merger reads of those, one after the other, each in window order."""
    media: tuple[tuple[int, str | None], ...]
    """Of each image and video: its number of patches, and the key that its rows are to be kept
    under; None where they are here."""

    def joined(self, computed: Tensor) -> Tensor:
        """(P, D) of all media in order; `computed` are the rows of those that are not here."""
        here = iter(self.rows.split([count for count, key in self.media if key is None]))
        others = iter(computed.split([count for count, key in self.media if key is not None]))
        return torch.cat([next(here if key is None else others) for _, key in self.media])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Features":
        return _each(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Features":
        return _each(self, lambda x: x.pin_memory())


@dataclass(frozen=True)
class Batch:
    """One micro-batch of S samples."""

    input_ids: Tensor
    """(T,) int64."""
    position_ids: Tensor
    """(3, T) int64: M-RoPE positions (time, height, width)."""
    segments: Segments
    """The samples."""
    target_rows: Tensor
    """(N,) int64: rows whose next token is learnt."""
    targets: Tensor
    """(N,) int64: that next token."""
    weights: Tensor | None
    """(N,) float32: weight of each target; None where all are 1."""
    visual_rows: Tensor
    """(V,) int64: rows that the vision features replace; empty for text alone."""
    patches: Tensor
    """(P, patch_dim) uint8 RGB levels. Text alone carries a blank dummy image, because
    every rank must run the merger in every micro-batch."""
    vision: VisionPlan
    """Of `patches`; but `reverse_index` is of all media, in `features` or not."""
    ids: tuple[str, ...]
    """Where each sample comes from, for messages."""
    sources: Tensor | None = None
    """(N,) int64: number of the source that each target is from, for the loss per source; None
    where nobody asks for it."""
    features: Features | None = None
    """Media that `patches` lacks; None where nothing is kept on disk."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return _each(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return _each(self, lambda x: x.pin_memory())


def _each(record, change):
    """A copy of a dataclass with `change` done to its tensors and nested records."""
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor | Segments | VisionPlan | Features):
            changed[field.name] = change(value)
    return replace(record, **changed)

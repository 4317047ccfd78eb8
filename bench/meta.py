"""The FLOPs that torch counts in a micro-batch on the meta device.

Nothing is computed there, so that the full-size model runs on any machine. torch counts every pair
of a segment in attention, the masked ones too.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.batch import Batch


def on_meta(batch: Batch) -> Batch:
    """The batch without values, yet with the grouping of its segments, which follows from them."""
    moved = batch.to("meta")
    pairs = [(batch.segments, moved.segments)]
    pairs += [(getattr(batch.vision, n), getattr(moved.vision, n)) for n in ("windows", "frames")]
    for real, empty in pairs:
        groups, restore = real.by_length
        groups = [(n, rows if rows is None else rows.to("meta")) for n, rows in groups]
        restore = restore if restore is None else restore.to("meta")
        empty.__dict__["by_length"] = groups, restore
    return moved


def count(loss: Callable[[], Tensor]) -> int:
    """FLOPs of a forward pass and, where the loss has a graph, of its backward pass."""
    in_place = {torch.ops.aten.addmm_: _addmm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, sdpa_kernel(SDPBackend.MATH):
        result = loss()
        if result.requires_grad:
            result.backward()
    return counter.get_total_flops()


def _addmm_flops(_sum, left, right, **_) -> int:
    """Of the head's gradient, added up in place, for which torch has no formula."""
    return 2 * left[0] * left[1] * right[1]

"""Activation checkpointing: what a block keeps for its backward pass. No policy changes a number.

- `none` keeps all that autograd saves.
- `pointwise` keeps the results of matrix products, attention and residual sums, and computes
  norms, rope, silu(gate) * up and GELU again from them: half of the memory for little time.
- `full` keeps a block's input and runs its whole forward again (arXiv:1604.06174).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Policy = Literal["none", "pointwise", "full"]
Policies = tuple[Policy, Policy]
"""Of the ViT's blocks, the merger among them, and of the language model's."""

_marking: ContextVar[bool] = ContextVar("marking", default=False)
"""Whether `pointwise` is to act: in the forward pass of a block under that policy."""


def check_policy(policy: str) -> None:
    """Raise ValueError unless `policy` is one of `Policy`."""
    if policy not in get_args(Policy):
        raise ValueError(f"recompute policy {policy!r} is not one of {', '.join(get_args(Policy))}")


def run_block(block: nn.Module, policy: Policy, x: Tensor, *args) -> Tensor:
    """`block(x, *args)` under a policy."""
    trains = x.requires_grad or any(p.requires_grad for p in block.parameters())
    if policy == "none" or not (trains and torch.is_grad_enabled()):
        return block(x, *args)
    if policy == "full":
        return checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
    with _set_marking(True), saved_tensors_hooks(_pack, _unpack):
        return block(x, *args)


def pointwise(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, of which the policy `pointwise` keeps the inputs alone: neither what
    autograd saves inside, nor the result where a later operation saves it or a view of it.

    Args:
        function: pure and cheap. What it closes over is held, too.
    """
    if torch.compiler.is_compiling() or not _marking.get():  # a compiler decides by itself
        return function(*inputs)
    again = _Again(function, inputs)
    with _set_marking(False), saved_tensors_hooks(again.pack, again.unpack):
        result = function(*inputs)
    result.again = again
    return result


class _Again:
    """What a pointwise function saved and gave, computed again when the backward pass first asks
    for any of it. It is freed with the last saved tensor that stands for it."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.function = function
        self.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        self.packed = 0
        self.saved: list[Tensor] = []
        self.result: Tensor | None = None

    def pack(self, _saved: Tensor) -> int:
        self.packed += 1
        return self.packed - 1

    def unpack(self, place: int) -> Tensor:
        if not self.saved:
            self.compute()
        self.result = None  # whoever saved it has run
        return self.saved[place]

    def give(self) -> Tensor:
        if self.result is None:
            self.compute()
        return self.result

    def compute(self) -> None:
        """From the same inputs the same tensors are saved in the same order."""
        saved: list[Tensor] = []
        keep = saved_tensors_hooks(lambda x: saved.append(x.detach()), lambda _: None)
        with torch.enable_grad(), keep:
            self.result = self.function(*self.inputs).detach()
        self.saved = saved


def _pack(saved: Tensor) -> Tensor | tuple:
    base = saved if saved._base is None else saved._base
    again = getattr(base, "again", None)
    if again is None:
        return saved.detach()  # with its graph it would hold itself
    return again, saved.shape, saved.stride(), saved.storage_offset()


def _unpack(packed: Tensor | tuple) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    again, *layout = packed
    return again.give().as_strided(*layout)


@contextmanager
def _set_marking(value: bool) -> Iterator[None]:
    token = _marking.set(value)
    try:
        yield
    finally:
        _marking.reset(token)

"""Activation checkpointing: what a block keeps for its backward pass.

`none` keeps everything; `full` keeps a block's input and runs its forward again in the
backward pass (arXiv:1604.06174), which changes no number.
"""

from typing import Literal, get_args

from torch import nn
from torch.utils.checkpoint import checkpoint

Policy = Literal["none", "full"]


def run_block(block: nn.Module, policy: Policy, *args):
    """`block(*args)` under a policy."""
    if policy == "full":
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return block(*args)


def check_policy(policy: str) -> None:
    """Raise ValueError unless `policy` is one of `Policy`."""
    if policy not in get_args(Policy):
        raise ValueError(f"recompute policy {policy!r} is not one of {', '.join(get_args(Policy))}")

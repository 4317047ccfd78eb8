"""`torch.compile`, block by block: norms, rope, SwiGLU and residual sums become fused kernels.

A block is compiled in two pieces, before and after attention, which stays outside: its kernels are
fused already, and what it is told of segments changes with every micro-batch. The pieces see
tensors alone, and all blocks of a tower share their code. A run compiles each piece once for every
pair of what has a gradient (its input, its weights; one pair where everything trains, three where
the last layers do), and as often again for evaluation, whatever the lengths.

What would be compiled for itself and is not worth it runs as it is: fewer than two rows, whose
sizes a compiler takes for constants, and generation.

A compiled piece decides by itself what it keeps for the backward pass, and computes pointwise
operations again: the recompute policies `none` and `pointwise` are the same here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vlm.model import VisionLanguageModel

PIECES = ("before", "after")
ROUNDING = {"emulate_precision_casts": True}
"""Inductor's: round to bfloat16 wherever the code does, as eager mode and the donors do. Else it
keeps float32 inside a kernel, and one value of four comes out of a norm differently."""
VARIANTS = 64
"""Of a piece, beyond which dynamo runs it uncompiled for good, with a warning. Its own 8 are near:
three for training and three for evaluation where the last layers train."""


def compile_blocks(model: VisionLanguageModel, backend: str = "inductor") -> None:
    """Compile the blocks of both towers, in place; each piece when it first runs.

    Names in the state dict stay. Needs a C++ compiler on a CPU, Triton on a GPU. Raises dynamo's
    limit of variants, for the process.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    options = ROUNDING if backend == "inductor" else None
    for block in (*model.visual.blocks, *model.language_model.layers):
        for piece in PIECES:
            eager = getattr(block, piece)
            compiled = torch.compile(eager, dynamic=True, backend=backend, options=options)
            setattr(block, piece, _worth_it(compiled, eager))


def _worth_it(compiled: Callable, eager: Callable) -> Callable:
    def piece(x: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        generates = torch.is_inference_mode_enabled()  # as vlm/generate.py alone does
        return (eager if generates or len(x) < 2 else compiled)(x, *others)

    return piece

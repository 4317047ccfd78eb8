"""`torch.compile`, block by block: norms, rope, SwiGLU and residual sums become fused kernels.

A block is compiled in two pieces, before and after attention, which stays outside: its kernels are
fused already, and what it is told of segments changes with every micro-batch. The pieces see
tensors alone, of any number of rows, and all blocks of a tower share their code. So a run compiles
each piece once for training and once for evaluation, whatever the lengths.

A compiled piece decides by itself what it keeps for the backward pass, and computes pointwise
operations again: the recompute policies `none` and `pointwise` are the same here.
"""

import torch

from vlm.model import VisionLanguageModel

PIECES = ("before", "after")
ROUNDING = {"emulate_precision_casts": True}
"""Inductor's: round to bfloat16 wherever the code does, as eager mode and the donors do. Else it
keeps float32 inside a kernel, and one value of four comes out of a norm differently."""


def compile_blocks(model: VisionLanguageModel, backend: str = "inductor") -> None:
    """Compile the blocks of both towers, in place; each piece when it first runs.

    Names in the state dict stay. Needs a C++ compiler on a CPU, Triton on a GPU.
    """
    options = ROUNDING if backend == "inductor" else None
    for block in (*model.visual.blocks, *model.language_model.layers):
        for piece in PIECES:
            eager = getattr(block, piece)
            compiled = torch.compile(eager, dynamic=True, backend=backend, options=options)
            setattr(block, piece, compiled)

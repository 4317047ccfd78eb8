"""Counts what makes the host wait for the device, in a run of train/sft.py on any device.

On a GPU these are the operations that need a result on the host: values that are read, and
results whose shape depends on values. On a CPU nothing waits, but the same calls are made.
"""

import ast
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train.engine
import train.sft

METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
"""Of Tensor; on a CPU they dispatch no operation."""
OPERATIONS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"}
OPERATIONS |= {"_unique2", "unique_dim", "unique_consecutive"}
HERE = (__file__, torch.__path__[0])


class Reads(TorchDispatchMode):
    """A context. Each read is told as `file:line` of the code that made it, outside of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.micro_steps: list[str] = []
        self.steps: list[str] = []
        """Those while a micro-batch runs, and those of the engine's step."""
        self._patches = ExitStack()
        tree = ast.parse(Path(train.sft.__file__).read_text())
        (loop,) = (n for n in ast.walk(tree) if isinstance(n, ast.For) and _over_micro_batches(n))
        self._loop = range(loop.body[0].lineno, loop.end_lineno + 1)

    def __enter__(self) -> "Reads":
        for name in METHODS:
            counted = self._counted(getattr(torch.Tensor, name))
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, counted))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _reads(operation, args, kwargs):
            self._count()
        return operation(*args, **kwargs)

    def _counted(self, method):
        def read(*args):
            self._count()
            return method(*args)

        return read

    def _count(self) -> None:
        frame, reader = sys._getframe(1), None
        while frame:
            if reader is None and not frame.f_code.co_filename.startswith(HERE):
                reader = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if _is(frame, train.engine, "step"):
                self.steps.append(reader)
            if _is(frame, train.sft, "train") and frame.f_lineno in self._loop:
                self.micro_steps.append(reader)
            frame = frame.f_back


def _over_micro_batches(loop: ast.For) -> bool:
    return isinstance(loop.iter, ast.Attribute) and loop.iter.attr == "micro_batches"


def _is(frame: FrameType, module, function: str) -> bool:
    return (frame.f_code.co_filename, frame.f_code.co_name) == (module.__file__, function)


def _reads(operation, args, kwargs) -> bool:
    name = operation.overloadpacket.__name__
    if name in ("index", "index_put_", "index_put"):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in OPERATIONS

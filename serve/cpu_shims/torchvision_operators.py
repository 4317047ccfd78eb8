"""Lets a torchvision that was built for CUDA be imported beside a CPU torch (README.md here).

Every Python process of the environment imports this module as it starts, so it must stay cheap:
torch is imported only once somebody asks for torchvision.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators before its import, where its own library is of no use."""

    library = None
    """Declarations live as long as this object."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec("torchvision")
            if spec and not self.loads(Path(spec.origin).parent):
                self.declare()
        return None  # the import itself is the next finder's

    @staticmethod
    def loads(folder: Path) -> bool:
        import torch

        try:
            for library in folder.glob("_C.*so"):
                torch.ops.load_library(str(library))
        except OSError:
            return False
        return hasattr(torch.ops.torchvision, OPERATORS[0])

    def declare(self) -> None:
        import torch

        type(self).library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            self.library.define(name + SIGNATURE)


sys.meta_path.insert(0, DeclareOperators())

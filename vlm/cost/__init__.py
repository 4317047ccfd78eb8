"""What a model costs to train, from its config alone: `python -m vlm.cost --help`.

FLOPs and parameters are in `flops.py`, how what trains is told in `trained.py` and what follows
from it in `passes.py`, memory in `memory.py`, peaks of devices in `hardware.py`, communication,
time and the tables in `report.py`, the samples that are counted in `samples.py`.
"""

from vlm.cost.flops import (
    CONVENTION,
    flops_by_module,
    parameter_counts,
    parameters_by_module,
    sample_flops,
    sample_flops_array,
    text_flops,
    vision_flops,
)
from vlm.cost.trained import PARTS, any_trains, names_of, part_of

__all__ = [
    "CONVENTION",
    "PARTS",
    "any_trains",
    "flops_by_module",
    "names_of",
    "parameter_counts",
    "parameters_by_module",
    "part_of",
    "sample_flops",
    "sample_flops_array",
    "text_flops",
    "vision_flops",
]

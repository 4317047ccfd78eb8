"""What a model costs to train, from its config alone: `python -m vlm.cost --help`.

FLOPs and parameters are in `flops.py`, memory in `memory.py`, communication, time and the tables
in `report.py`, the samples that are counted in `samples.py`.
"""

from vlm.cost.flops import (
    CONVENTION,
    PARTS,
    causal_attention,
    decoder_linear,
    flops_by_module,
    head_linear,
    merger_linear,
    parameter_counts,
    parameters_by_module,
    part_of,
    sample_flops,
    sample_flops_array,
    tower_attention,
    tower_linear,
)

__all__ = [
    "CONVENTION",
    "PARTS",
    "causal_attention",
    "decoder_linear",
    "flops_by_module",
    "head_linear",
    "merger_linear",
    "parameter_counts",
    "parameters_by_module",
    "part_of",
    "sample_flops",
    "sample_flops_array",
    "tower_attention",
    "tower_linear",
]

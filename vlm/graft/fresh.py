"""What neither donor can give, from one seed: the merger, zero biases, rows for new tokens.

`--merger_init` says how the merger begins:

- `default`: transformers' initialiser for it, normal(0, initializer_range) weights and zero biases;
- `xavier`: Glorot and Bengio's uniform weights (2010) and zero biases, whose outputs have about the
  spread of their inputs at any width;
- `donor`: the vision donor's own merger, but for what has another shape in the hybrid. Its output
  layer does where the widths differ, and then begins as by `default`; where they are equal the
  whole merger is kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm.graft.plan import MERGER, Step
from vlm.tensor_file import DTYPES

INITIALIZER_RANGE = 0.02
"""transformers' default, which the hub's vision configs leave out."""


def fresh_tensors(steps: Sequence[Step], config: dict, seed: int) -> dict[str, Tensor]:
    """Every value that a plan makes anew, by the tensor's name, in the dtype that is written.

    Of a resized tensor only the added rows. The same plan and seed give the same bytes: values are
    drawn in float32 on the CPU, in the plan's order, and rounded once.
    """
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for step in steps:
        if not step.fill:
            continue
        part = "vision_config" if step.name.startswith(MERGER) else "text_config"
        std = config[part].get("initializer_range", INITIALIZER_RANGE)
        rows = step.added_rows or step.shape[0]
        values = torch.empty(rows, *step.shape[1:])
        fresh[step.name] = fill(values, step.fill, std, generator).to(DTYPES[step.dtype])
    return fresh


def fill(values: Tensor, how: str, std: float, generator: torch.Generator) -> Tensor:
    """`values` overwritten; `how` as in `Step.fill`."""
    if how == "normal":
        return values.normal_(0.0, std, generator=generator)
    if how == "xavier_uniform":
        return nn.init.xavier_uniform_(values, generator=generator)
    return values.fill_({"zeros": 0.0, "ones": 1.0}[how])

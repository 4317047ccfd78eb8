"""What the user of a build may choose."""

from dataclasses import dataclass
from typing import Literal

from vlm.shards import SHARD_BYTES


@dataclass(frozen=True)
class BuildOptions:
    """The choices of a build; with the donors they settle every byte of the result.

    Attributes:
        seed: of everything that is drawn at random.
        variant: `exact` keeps the language donor's function on text; `literal` the plain recipe.
        merger_init: `default` (torch's own for a Linear), `xavier`, or `donor` (the vision
            donor's merger where its shapes fit).
        llm_layers: keep only the first layers of the language donor; None keeps all.
        dtype: what every tensor is written in; None keeps each donor tensor's own.
        max_shard_size: bytes of tensors in one weight file; a larger tensor gets its own.
    """

    seed: int = 0
    variant: Literal["exact", "literal"] = "exact"
    merger_init: Literal["default", "xavier", "donor"] = "default"
    llm_layers: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    max_shard_size: int = SHARD_BYTES

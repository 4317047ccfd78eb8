"""What the user of a build may choose."""

from dataclasses import dataclass
from typing import Literal

from vlm.hf_config import ConfigError
from vlm.shards import SHARD_BYTES


@dataclass(frozen=True)
class BuildOptions:
    """The choices of a build; with the donors they settle every byte of the result.

    Attributes:
        seed: of everything that is drawn at random.
        variant: `exact` keeps the language donor's function on text; `literal` the plain recipe.
        merger_init: `default` (transformers' normal(0, 0.02)), `xavier`, or `donor` (the vision
            donor's merger where its shapes fit).
        llm_layers: keep only the first layers of the language donor; None keeps all.
        dtype: what every tensor is written in; None keeps each donor tensor's own.
        max_shard_size: bytes of tensors in one weight file; a larger tensor gets its own.

    Raises:
        ConfigError: a number outside its range.
    """

    seed: int = 0
    variant: Literal["exact", "literal"] = "exact"
    merger_init: Literal["default", "xavier", "donor"] = "default"
    llm_layers: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    max_shard_size: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}: give a whole number from 0 to 2^63 - 1")
        if self.llm_layers is not None and self.llm_layers < 1:
            raise ConfigError(f"--llm_layers {self.llm_layers}: give 1 or more")

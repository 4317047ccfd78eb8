"""The model's own configuration: frozen dataclasses, one per tower.

`vlm/hf_config.py` translates them from and to the `config.json` of the hub.
"""

from dataclasses import dataclass, fields

LARGEST = 10**9
"""Of any number in a config; beyond it sizes overflow."""
WANTED = {int: "a whole number", float: "a number", bool: "true or false"}


def check_numbers(config: object) -> None:
    """Every int, float and bool field of a dataclass is one, and a number above 0.

    Raises ValueError with the field and its value.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type not in WANTED:
            continue
        fits = type(value) is field.type or (field.type is float and type(value) is int)
        # not so for NaN either
        if not fits or (field.type is not bool and not 0 < value <= LARGEST):
            above = "" if field.type is bool else f" above 0 and up to {LARGEST}"
            raise ValueError(f"{field.name} is {value!r}, not {WANTED[field.type]}{above}")


@dataclass(frozen=True)
class VisionConfig:
    """Qwen2.5-VL's vision tower (Qwen2.5-VL technical report, section 2.1)."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    """Width of the merger's output: the language model's hidden size."""
    fullatt_block_indexes: tuple[int, ...]
    """Blocks that attend over a whole frame; all others attend inside windows."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    """Side of an attention window, in pixels."""
    in_channels: int = 3
    tokens_per_second: float = 2
    """M-RoPE's temporal positions per second of video."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide the tower's hidden_size "
                f"{self.hidden_size} into heads of a multiple of 4 (rows and columns, in pairs)"
            )
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(
                f"window_size {self.window_size} holds no visual token of "
                f"{self.patch_size * self.spatial_merge_size} pixels"
            )
        for index in self.fullatt_block_indexes:
            if type(index) is not int or not 0 <= index < self.depth:
                raise ValueError(
                    f"fullatt_block_indexes holds {index!r}; the tower's {self.depth} blocks are "
                    f"0 to {self.depth - 1}"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels x time x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that the merger joins into one visual token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class TextConfig:
    """A Qwen decoder: Qwen3 with `qk_norm`, Qwen2.5 with `qkv_bias`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    qkv_bias: bool = False
    mrope_section: tuple[int, int, int] | None = None
    """Frequencies given to time, height and width; None for plain one-dimensional rope."""
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rope turns pairs")
        section = self.mrope_section
        if section is not None and not (
            [type(part) for part in section] == [int] * 3 and min(section) >= 0
        ):
            raise ValueError(f"mrope_section is {list(section)}, not three whole numbers from 0 on")
        if section is not None and sum(section) != self.head_dim // 2:
            raise ValueError(
                f"mrope_section {list(section)} sums to {sum(section)}, "
                f"but head_dim {self.head_dim} has {self.head_dim // 2} frequencies"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )


@dataclass(frozen=True)
class VLMConfig:
    """The hybrid: a vision tower with its merger, and a decoder."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"the merger writes rows of width {self.vision.out_hidden_size}, "
                f"the decoder reads rows of width {self.text.hidden_size}"
            )

"""The model's own configuration: frozen dataclasses, one per tower.

`vlm/hf_config.py` translates them from and to the `config.json` of the hub.
"""

from dataclasses import dataclass


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
        if self.mrope_section is not None and sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(
                f"mrope_section {list(self.mrope_section)} sums to {sum(self.mrope_section)}, "
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
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"the merger writes rows of width {self.vision.out_hidden_size}, "
                f"the decoder reads rows of width {self.text.hidden_size}"
            )

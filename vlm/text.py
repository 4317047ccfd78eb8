"""The decoder: Qwen3 (QK-norm, grouped-query attention, explicit head_dim, SwiGLU).

`qk_norm` and `qkv_bias` in the config give Qwen2.5's decoder as well. Positions are M-RoPE's
where the config has an `mrope_section`, else plain.
Sources: Qwen3 technical report, arXiv:2505.09388, section 2; Qwen2.5, arXiv:2412.15115.

Legend: T rows, N rows asked for, D hidden size, H heads, K key/value heads, E head_dim.
"""

from collections.abc import Callable

from torch import Tensor, nn

from vlm.config import TextConfig
from vlm.layers import RMSNorm, SwiGLU
from vlm.recompute import Policy, pointwise, run_block
from vlm.rope import apply_mrope, apply_rope, mrope_tables, rope_tables

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q (T, H, E), k (T, K, E), v (T, K, E)) -> (T, H, E). Training attends inside
the packed samples; generation puts its key/value cache here."""


class TextDecoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Policy = "none"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, position_ids: Tensor, attend: Attend, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the last layer, before the final norm.

        Args:
            x: (T, D) embeddings.
            position_ids: (3, T) int64; plain rope reads the first row.
            rows: (N,) int64: those whose logits are wanted; None for all. After the last layer's
                attention no row needs another, so the others are not computed further.

        Returns:
            (N, D).
        """
        if self.config.mrope_section is None:
            cos, sin = rope_tables(position_ids[0], self.config)
        else:
            cos, sin = mrope_tables(position_ids, self.config)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        *layers, last = self.layers
        for layer in layers:
            x = run_block(layer, self.recompute, x, cos, sin, attend)
        return run_block(last, self.recompute, x, cos, sin, attend, rows)


class DecoderLayer(nn.Module):
    """`before` and `after` attention are pieces that `vlm/compile.py` may compile."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, rows: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (N, D) at `rows`, which all attend to all that they may; None for all."""
        mixed = attend(self.self_attn.index, *self.before(x, cos, sin))
        if rows is not None:
            x, mixed = x[rows], mixed[rows]
        return self.after(x, mixed)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads, of x (T, D): q (T, H, E), k and v (T, K, E)."""
        return self.self_attn.queries_keys_values(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's result (T, D), of its input and attention's result (T, H, E)."""
        x = x + self.self_attn.o_proj(mixed.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        width, bias = config.hidden_size, config.qkv_bias
        heads = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, heads, bias=bias)
        self.k_proj = nn.Linear(width, shared, bias=bias)
        self.v_proj = nn.Linear(width, shared, bias=bias)
        self.o_proj = nn.Linear(heads, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.rotate = apply_rope if config.mrope_section is None else apply_mrope

    def queries_keys_values(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            proj(x).unflatten(1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = pointwise(lambda q: self._turned(q, self.q_norm, cos, sin), q)
        k = pointwise(lambda k: self._turned(k, self.k_norm, cos, sin), k)
        return q, k, v

    def _turned(self, x: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotate(x if norm is None else norm(x), cos, sin)

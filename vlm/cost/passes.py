"""How often each matrix product of a training step is computed: forward; for the gradient of its
weight, if that trains; for the gradient of its input, if something below it trains.

Inside the lowest block where anything trains only matrices count as "below": what reaches the
block's norms and biases through its own products is not counted.
"""

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

from vlm.config import TextConfig, VisionConfig
from vlm.cost.trained import any_trains

DECODER, TOWER = "model.language_model.", "model.visual."


class TextPasses(NamedTuple):
    linear: int
    """FLOPs per token of the layers' products, each times its passes."""
    last: int
    """The same per target token of what follows the last layer's attention."""
    attention: int
    """Products of causal attention, summed over layers: two forward, up to four backward."""
    head: int
    """Passes of the head."""


class VisionPasses(NamedTuple):
    linear: int
    """FLOPs per patch of the patch embedding's and the blocks' products."""
    frames: int
    """Products of attention over whole frames, summed over blocks."""
    windows: int
    """The same of attention inside windows."""
    merger: int
    """FLOPs per visual token."""


Step = dict[str, int]
"""Weights that multiply the same input -> their number of values."""


@lru_cache
def text_passes(text: TextConfig, trains: frozenset[str]) -> TextPasses:
    """Of the decoder and its head."""
    d, e = text.hidden_size, text.head_dim
    heads, shared = text.num_attention_heads * e, text.num_key_value_heads * e
    queries = {"self_attn.q_proj": d * heads}
    queries |= {"self_attn.k_proj": d * shared, "self_attn.v_proj": d * shared}
    after_attention = [{"self_attn.o_proj": heads * d}, *_feed_forward(d, text.intermediate_size)]
    below = "vit" in trains or "aligner" in trains
    below = below or any_trains(f"{DECODER}embed_tokens.", trains)
    linear = attention = last = 0
    for index in range(text.num_hidden_layers):
        linear += last  # of the layer before
        prefix = f"{DECODER}layers.{index}."
        first, inside = _walk([queries], prefix, below, trains)
        q, k, v = (below or any_trains(f"{prefix}{name}.weight", trains) for name in queries)
        attention += 2 + v + (q or k) + q + k  # gradients of values, of scores, of queries, of keys
        last, _ = _walk(after_attention, prefix, inside, trains)
        linear += first
        below = below or any_trains(prefix, trains)
    below = below or any_trains(f"{DECODER}norm.", trains)
    head = f"{DECODER}embed_tokens." if text.tie_word_embeddings else "lm_head."
    return TextPasses(linear, last, attention, 1 + any_trains(head, trains) + below)


@lru_cache
def vision_passes(vision: VisionConfig, trains: frozenset[str]) -> VisionPasses:
    """Of the tower and the merger."""
    d, joined = vision.hidden_size, vision.hidden_size * vision.merge_unit
    after_attention = [{"attn.proj": d * d}, *_feed_forward(d, vision.intermediate_size)]
    # the patch embedding's input is pixels: no gradient of it
    linear, below = _walk([{"patch_embed.proj": vision.patch_dim * d}], TOWER, False, trains)
    frames = windows = 0
    for index in range(vision.depth):
        prefix = f"{TOWER}blocks.{index}."
        first, inside = _walk([{"attn.qkv": 3 * d * d}], prefix, below, trains)
        if index in vision.fullatt_block_indexes:
            frames += 6 if inside else 2
        else:
            windows += 6 if inside else 2
        second, _ = _walk(after_attention, prefix, inside, trains)
        linear += first + second
        below = below or any_trains(prefix, trains)
    steps = [{"mlp.0": joined * joined}, {"mlp.2": joined * vision.out_hidden_size}]
    merger, _ = _walk(steps, f"{TOWER}merger.", below, trains)
    return VisionPasses(linear, frames, windows, merger)


def _feed_forward(width: int, hidden: int) -> list[Step]:
    """Products of a `vlm.layers.SwiGLU`."""
    both = {"mlp.gate_proj": width * hidden, "mlp.up_proj": width * hidden}
    return [both, {"mlp.down_proj": hidden * width}]


def _walk(steps: list[Step], prefix: str, below: bool, trains: Collection[str]) -> tuple[int, bool]:
    """FLOPs per row of steps one after the other, and whether anything below their end trains."""
    flops = 0
    for step in steps:
        own = {name: any_trains(f"{prefix}{name}.weight", trains) for name in step}
        flops += sum(2 * size * (1 + own[name] + below) for name, size in step.items())
        below = below or any(own.values())
    return flops, below

"""Memory of one GPU, in bytes: weights and their training state, activations, logits.

Activations are what autograd saves for the backward pass of `vlm/model.py`, tensor by tensor,
with an attention that keeps q, k, v, its output and a log-sum per row and head
(FlashAttention-2, arXiv:2307.08691). Tests compare them with what a real backward saves.
Not counted: the allocator's fragmentation, the CUDA context, the buffers of NCCL, the batch
itself, a layer's weight gradients on their way into the bucket, and what the forward pass needs
only while it runs, which is less than the backward pass does unless the tower is frozen and
large beside the decoder.

Legend: T tokens, N target tokens, P patches, D hidden size, H heads, K key/value heads,
E head_dim, F width of the feed-forward layer, V vocabulary; `size` is bytes per value.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost.flops import Count
from vlm.loss import CHUNK_ROWS
from vlm.recompute import Policy

FLOAT32 = 4
BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once (`reduce_bucket_size`, its default)."""


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds; arrays stand for many micro-batches."""

    tokens: Count
    targets: Count
    patches: Count


def training_state(parameters: int, trained: int, gpus: int, size: int) -> dict[str, int]:
    """Bytes per GPU of weights, gradients and AdamW, as `train/engine.py` keeps them.

    Several GPUs: ZeRO-2 (arXiv:1910.02054), where everything float32 is spread over the GPUs:
    in bfloat16 2P + 16P/N. One GPU: the plain engine, whose float32 weights are their own masters.
    """
    share = -(-trained // gpus)
    state = {
        "weights": size * parameters,
        "master weights": FLOAT32 * share,
        "AdamW moments": 2 * FLOAT32 * share,
        "gradients": FLOAT32 * share,
    }
    if gpus == 1:
        state["master weights"] *= size != FLOAT32
        return state
    # the bucket, its flattened copy, and a float32 copy of that where it is not float32
    copies = size + (FLOAT32 if size != FLOAT32 else 0)
    return state | {"reduction bucket": size * BUCKET + copies * min(trained, BUCKET)}


def saved_activations(
    config: VLMConfig, load: Load, trains: Collection[str], policy: Policy, size: int
) -> dict[str, Count]:
    """Bytes that the forward pass leaves for the backward pass, by module.

    Args: trains: which of `PARTS` train; at least one.
    """
    text, vision = config.text, config.vision
    tower, merger, decoder = ("vit" in trains), ("aligner" in trains), ("llm" in trains)
    patches = np.maximum(load.patches, vision.merge_unit)  # text alone carries a blank image
    return {
        "vision tower": _tower(vision, patches, policy, size) if tower else 0 * patches,
        "merger": _merger(vision, patches, tower, merger, size)
        # its output, where it goes into the decoder's rows
        + size * (load.patches // vision.merge_unit) * text.hidden_size * (tower or merger),
        "decoder": _decoder(text, load.tokens, decoder, policy, size),
        "final norm and gradients of the head": _head(text, load.targets, decoder, size),
    }


def peak_activations(
    config: VLMConfig, load: Load, trains: Collection[str], policy: Policy, size: int
) -> dict[str, int]:
    """`saved_activations`, and the most that comes on top of them at any time.

    That is the largest of: the logits of a chunk; the loss's gradients while they are scaled;
    the backward pass of the decoder's last layer, or of the tower's last block, by when what
    was saved after it is gone.
    """
    text, vision, tower, decoder = config.text, config.vision, "vit" in trains, "llm" in trains
    saved = saved_activations(config, load, trains, policy, size)
    saved = {name: int(count) for name, count in saved.items()}
    head = saved["final norm and gradients of the head"]
    layer = decoder_layer(text, load.tokens, decoder, size)
    widths = text.hidden_size, text.intermediate_size
    moments = [
        loss_memory(text, load.targets, size),
        size * text.hidden_size * (load.targets + text.vocab_size * decoder),
        _backward(layer, load.tokens, *widths, decoder, policy, size) - head,
    ]
    if tower:
        block = vision_block(vision, load.patches, size)
        widths = vision.hidden_size, vision.intermediate_size
        gone = head + saved["decoder"] + saved["merger"]
        moments.append(_backward(block, load.patches, *widths, True, policy, size) - gone)
    return saved | {"largest transient": max(moments)}


def loss_memory(text: TextConfig, targets: int, size: int) -> int:
    """Bytes that `vlm.loss` needs while it runs, beside the gradients that it returns.

    A chunk's float32 logits and the temporary of their logsumexp; or a second chunk's, while the
    first one's logits and their gradient still exist.
    """
    first, second = min(targets, CHUNK_ROWS), min(max(targets - CHUNK_ROWS, 0), CHUNK_ROWS)
    old, new = (FLOAT32, 2 * FLOAT32) if size == FLOAT32 else (FLOAT32 + size, FLOAT32 + size)
    return text.vocab_size * max(2 * FLOAT32 * first, old * first + new * second)


def decoder_layer(text: TextConfig, rows: Count, trained: bool, size: int) -> Count:
    """Bytes that one decoder layer saves: with weights that are frozen, no product's input."""
    width, heads, shared = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    saved = 2 * _norm(rows, width, trained, size) + size * rows * width * trained
    if text.qk_norm:
        saved += _norm(rows * (heads + shared), text.head_dim, trained, size)
    # q, k, v and the output (the input of o_proj), and the log-sums
    saved += rows * (size * text.head_dim * 2 * (heads + shared) + FLOAT32 * heads)
    return saved + _swiglu(rows, width, text.intermediate_size, trained, size)


def vision_block(vision: VisionConfig, rows: Count, size: int) -> Count:
    """Bytes that one trained block of the tower saves."""
    width = vision.hidden_size
    saved = 2 * _norm(rows, width, True, size) + size * rows * width
    # turned q and k; v, a view that keeps q and k before the turn alive; the output
    saved += rows * (size * 6 * width + FLOAT32 * vision.num_heads)
    return saved + _swiglu(rows, width, vision.intermediate_size, True, size)


def _decoder(text: TextConfig, rows: Count, trained: bool, policy: Policy, size: int) -> Count:
    input_only = size * rows * text.hidden_size
    layer = input_only if policy == "full" else decoder_layer(text, rows, trained, size)
    tables = text.head_dim * (2 if text.mrope_section else 1)  # cosines and sines
    return text.num_hidden_layers * layer + size * rows * tables


def _tower(vision: VisionConfig, rows: Count, policy: Policy, size: int) -> Count:
    input_only = size * rows * vision.hidden_size
    block = input_only if policy == "full" else vision_block(vision, rows, size)
    tables = FLOAT32 * rows * vision.head_dim
    return size * rows * vision.patch_dim + vision.depth * block + tables


def _merger(vision: VisionConfig, rows: Count, below: bool, trained: bool, size: int) -> Count:
    saved = FLOAT32 * rows * (vision.hidden_size + 1) * below  # the norm's float32 copy
    # the normalised rows before and after their weight, and the input of the second product
    saved += 3 * size * rows * vision.hidden_size * trained
    return saved + size * rows * vision.hidden_size * (below or trained)  # the input of GELU


def _head(text: TextConfig, rows: Count, trained: bool, size: int) -> Count:
    saved = _norm(rows, text.hidden_size, trained, size) + size * rows * text.hidden_size
    return saved + size * text.vocab_size * text.hidden_size * trained


def _norm(rows: Count, width: int, trained: bool, size: int) -> Count:
    """A float32 copy and its scale; with a trained weight also what it multiplies."""
    return rows * (FLOAT32 * (width + 1) + size * width * trained)


def _swiglu(rows: Count, width: int, hidden: int, trained: bool, size: int) -> Count:
    """gate, silu(gate) and up; with trained weights also the products' inputs."""
    return size * rows * (3 * hidden + (width + hidden) * trained)


def _backward(
    block: int, rows: int, width: int, hidden: int, trained: bool, policy: Policy, size: int
) -> int:
    """What a block's backward pass adds at most, in its feed-forward layer: the gradients of its
    output, of silu(gate) * up and of both factors. A trained down_proj gives up its input."""
    gradients = size * rows * (width + (3 - trained) * hidden)
    if policy == "none":
        return gradients
    # in float32 the input that was kept is also the first norm's copy
    return gradients + block - (size * rows * width if size == FLOAT32 else 0)

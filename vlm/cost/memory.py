"""Memory of one GPU, in bytes: weights and their training state, activations, logits.

Activations are what autograd saves for the backward pass of `vlm/model.py`, tensor by tensor,
with an attention that keeps q, k, v, its output and a log-sum per row and head
(FlashAttention-2, arXiv:2307.08691). Tests compare them with what a real backward saves.
Not counted: the allocator's fragmentation, the CUDA context, the buffers of NCCL, the batch
itself, a layer's weight gradients on their way into the bucket, padded copies of the weights
(`vlm/layers.py`: on a GPU a tower that trains keeps 0.85 GB of them under `none` in the 8B hybrid),
and what the forward pass needs only while it runs, which is less than the backward pass does unless
the tower is frozen and large beside the decoder.

Legend: T tokens, N target tokens, P patches, D hidden size, H heads, K key/value heads,
E head_dim, F width of the feed-forward layer, V vocabulary; `size` is bytes per value.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from vlm.config import TextConfig, VisionConfig, VLMConfig
from vlm.cost.flops import Count
from vlm.cost.passes import DECODER, TOWER
from vlm.cost.trained import any_trains
from vlm.loss import even_rows
from vlm.recompute import Policies, Policy

FLOAT32 = 4
BLOCKS, LAYERS = f"{TOWER}blocks.", f"{DECODER}layers."
BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once (`reduce_bucket_size`, its default)."""


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds; arrays stand for many micro-batches."""

    tokens: Count
    targets: Count
    patches: Count


def training_state(
    parameters: int,
    trained: int,
    gpus: int,
    size: int,
    stage: int | None = None,
    offloads: bool = False,
    bucket: int = BUCKET,
) -> dict[str, int]:
    """Bytes per GPU of weights, gradients and AdamW, as `train/engine.py` keeps them.

    ZeRO-2 (arXiv:1910.02054) spreads everything float32 over the GPUs: in bfloat16 2P + 16P/N.
    The plain engine's float32 weights are their own masters.

    Args:
        stage: of ZeRO; 0: the plain engine; None: 2 on several GPUs, 0 on one.
        offloads: what is float32 lies in the host's memory.
        bucket: gradients that are reduced at once.
    """
    stage = (2 if gpus > 1 else 0) if stage is None else stage
    share = -(-trained // gpus)
    state = {
        "weights": size * parameters,
        "master weights": FLOAT32 * share,
        "AdamW moments": 2 * FLOAT32 * share,
        "gradients": FLOAT32 * (trained if stage == 1 else share),
    }
    if not stage:
        state["master weights"] *= size != FLOAT32
        return state
    if offloads:
        state |= dict.fromkeys(("master weights", "AdamW moments", "gradients"), 0)
    # the bucket, its flattened copy, and a float32 copy of that where it is not float32
    copies = size + (FLOAT32 if size != FLOAT32 else 0)
    return state | {"reduction bucket": size * bucket + copies * min(trained, bucket)}


def saved_activations(
    config: VLMConfig, load: Load, trains: Collection[str], recompute: Policies, size: int
) -> dict[str, Count]:
    """Bytes that the forward pass leaves for the backward pass, by module.

    Args: trains: at least one name, as in `vlm/cost/trained.py`. A block of which only some
        parameters train counts as if all did, the lowest that trains as if its input had a
        gradient.
    """
    text, vision = config.text, config.vision
    tower, merger = "vit" in trains, "aligner" in trains
    patches = np.maximum(load.patches, vision.merge_unit)  # text alone carries a blank image
    return {
        "vision tower": _tower(vision, patches, trains, recompute[0], size),
        "merger": _merger(vision, patches, tower, merger, recompute[0], size)
        # its output, where it goes into the decoder's rows
        + size * (load.patches // vision.merge_unit) * text.hidden_size * (tower or merger),
        "decoder": _decoder(text, load, trains, recompute[1], size),
        "final norm and gradients of the head": _head(text, load.targets, trains, size),
    }


def peak_activations(
    config: VLMConfig, load: Load, trains: Collection[str], recompute: Policies, size: int
) -> dict[str, int]:
    """`saved_activations`, and the most that comes on top of them at any time.

    That is the largest of: the logits of a chunk; the backward pass of the decoder's last layer,
    or of the tower's last block, by when what was saved after it is gone.
    """
    text, vision = config.text, config.vision
    saved = saved_activations(config, load, trains, recompute, size)
    saved = {name: int(count) for name, count in saved.items()}
    head = saved["final norm and gradients of the head"]
    moments = [loss_memory(text, load.targets, size)]
    if saved["decoder"]:
        moments += [m - head for m in _decoder_moments(text, load, trains, recompute[1], size)]
    if saved["vision tower"]:
        trained = any_trains(f"{BLOCKS}{vision.depth - 1}.", trains)
        block = vision_block(vision, load.patches, trained, "none", size)
        widths = vision.hidden_size, vision.intermediate_size
        gone = head + saved["decoder"] + saved["merger"]
        moment = _feed_forward(load.patches, *widths, trained, recompute[0], size)
        moment += _again(block, load.patches, widths[0], recompute[0], size)
        moments.append(moment - gone)
    return saved | {"largest transient": max(moments)}


def loss_memory(text: TextConfig, targets: int, size: int) -> int:
    """Bytes that `vlm.loss` needs while it runs, beside its arguments and their gradients: a
    chunk's float32 logits, and a copy where the head is not float32.
    """
    copies = size if size != FLOAT32 else 0
    return text.vocab_size * even_rows(targets) * (FLOAT32 + copies)


def decoder_layer(
    text: TextConfig,
    rows: Count,
    trained: bool,
    policy: Policy,
    size: int,
    targets: Count | None = None,
) -> Count:
    """Bytes that one decoder layer saves: with weights that are frozen, no product's input.

    Args: targets: rows that go on after the last layer's attention; None of another layer.
    """
    width, hidden = text.hidden_size, text.intermediate_size
    heads, shared = text.num_attention_heads, text.num_key_value_heads
    if policy == "full":
        return size * rows * width
    # q, k, v and the output, which is the input of o_proj, and the log-sums
    saved = rows * (size * text.head_dim * 2 * (heads + shared) + FLOAT32 * heads)
    if targets is None:
        targets = rows
    else:
        saved += size * targets * heads * text.head_dim * trained  # the input of o_proj, a copy
    if policy == "pointwise":
        return saved + _products(rows, targets, width, hidden, size)
    if text.qk_norm:
        saved += _norm(rows * (heads + shared), text.head_dim, trained, size)
    saved += _norm(rows + targets, width, trained, size) + size * rows * width * trained
    return saved + _swiglu(targets, width, hidden, trained, size)


def vision_block(
    vision: VisionConfig, rows: Count, trained: bool, policy: Policy, size: int
) -> Count:
    """Bytes that one block of the tower saves, as a decoder layer does."""
    width, hidden = vision.hidden_size, vision.intermediate_size
    if policy == "full":
        return size * rows * width
    # q, k and v in one, and the output
    saved = rows * (size * 4 * width + FLOAT32 * vision.num_heads)
    if policy == "pointwise":
        return saved + _products(rows, rows, width, hidden, size)
    saved += size * rows * 2 * width  # turned q and k; v, a view, keeps those before the turn alive
    saved += 2 * _norm(rows, width, trained, size) + size * rows * width * trained
    return saved + _swiglu(rows, width, hidden, trained, size)


def _products(rows: Count, after: Count, width: int, hidden: int, size: int) -> Count:
    """What `pointwise` keeps beside attention: a block's input; and of the rows after attention
    their sum with its output, gate and up."""
    return size * (rows * width + after * (width + 2 * hidden))


def _decoder(
    text: TextConfig, load: Load, trains: Collection[str], policy: Policy, size: int
) -> Count:
    trained, frozen = _layers_in_graph(text, trains)
    rows, last = load.tokens, _last_trains(text, trains)
    saved = trained * decoder_layer(text, rows, True, policy, size)
    saved += frozen * decoder_layer(text, rows, False, policy, size)
    if trained + frozen:
        saved += decoder_layer(text, rows, last, policy, size, load.targets)
        saved -= decoder_layer(text, rows, last, policy, size)
    tables = text.head_dim * (2 if text.mrope_section else 1)  # cosines and sines
    return saved + size * rows * tables * (trained + frozen > 0)


def _tower(
    vision: VisionConfig, rows: Count, trains: Collection[str], policy: Policy, size: int
) -> Count:
    embedding = any_trains(f"{TOWER}patch_embed.", trains)
    trained, frozen = _in_graph(BLOCKS, vision.depth, embedding, trains)
    saved = trained * vision_block(vision, rows, True, policy, size)
    saved += frozen * vision_block(vision, rows, False, policy, size)
    saved += size * rows * vision.patch_dim * embedding
    return saved + FLOAT32 * rows * vision.head_dim * (trained + frozen > 0)  # and the tables


def _layers_in_graph(text: TextConfig, trains: Collection[str]) -> tuple[int, int]:
    below = "vit" in trains or "aligner" in trains or any_trains(f"{DECODER}embed_tokens.", trains)
    return _in_graph(LAYERS, text.num_hidden_layers, below, trains)


def _in_graph(prefix: str, count: int, below: bool, trains: Collection[str]) -> tuple[int, int]:
    """Of blocks in their order: how many train, how many are frozen with something below them
    that trains. The others save nothing."""
    trained = frozen = 0
    for index in range(count):
        if any_trains(f"{prefix}{index}.", trains):
            trained += 1
        elif below or trained:
            frozen += 1
    return trained, frozen


def _merger(
    vision: VisionConfig, rows: Count, below: bool, trained: bool, policy: Policy, size: int
) -> Count:
    width = vision.hidden_size  # the merger's four times as wide rows are a quarter as many
    one = size * rows * width * (below or trained)
    if policy == "full":
        return one  # its input
    if policy == "pointwise":
        return 2 * one  # and that of GELU
    saved = FLOAT32 * rows * (width + 1) * below  # the norm's float32 copy
    # the normalised rows before and after their weight, and the input of the second product
    return saved + one + 3 * size * rows * width * trained


def _head(text: TextConfig, rows: Count, trains: Collection[str], size: int) -> Count:
    """The final norm, and the gradients that `vlm.loss` makes in the forward pass."""
    width, norm = text.hidden_size, any_trains(f"{DECODER}norm.", trains)
    saved = size * text.vocab_size * width * _head_trains(text, trains)
    return saved + _norm(rows, width, norm, size) + size * rows * width


def _last_trains(text: TextConfig, trains: Collection[str]) -> bool:
    return any_trains(f"{LAYERS}{text.num_hidden_layers - 1}.", trains)


def _head_trains(text: TextConfig, trains: Collection[str]) -> bool:
    return any_trains(f"{DECODER}embed_tokens." if text.tie_word_embeddings else "lm_head.", trains)


def _norm(rows: Count, width: int, trained: bool, size: int) -> Count:
    """A float32 copy and its scale; with a trained weight also what it multiplies."""
    return rows * (FLOAT32 * (width + 1) + size * width * trained)


def _swiglu(rows: Count, width: int, hidden: int, trained: bool, size: int) -> Count:
    """gate, silu(gate) and up; with trained weights also the products' inputs."""
    return size * rows * (3 * hidden + (width + hidden) * trained)


def _decoder_moments(
    text: TextConfig, load: Load, trains: Collection[str], policy: Policy, size: int
) -> list[int]:
    """What the backward pass adds to what was saved, less what is gone by then: in the last layer's
    feed-forward layer and its attention, and in the feed-forward layer of the one before."""
    width, hidden, rows = text.hidden_size, text.intermediate_size, load.tokens
    heads, shared = text.num_attention_heads, text.num_key_value_heads
    trained = _last_trains(text, trains)

    def last(policy: Policy, targets: int) -> int:
        return decoder_layer(text, rows, trained, policy, size, targets)

    after = _feed_forward(load.targets, width, hidden, trained, policy, size)
    after += _again(last("none", load.targets), rows, width, policy, size)
    # gradients of the residual, of attention's output, and of queries, keys and values
    attention = size * rows * (width + text.head_dim * 2 * (heads + shared))
    attention += _again(last("none", 0), rows, width, policy, size)
    attention -= last(policy, load.targets) - last(policy, 0)
    moments = [after, attention]
    index = text.num_hidden_layers - 2
    if index >= 0 and sum(_layers_in_graph(text, trains)) > 1:
        trained_too = any_trains(f"{LAYERS}{index}.", trains)
        before = _feed_forward(rows, width, hidden, trained_too, policy, size)
        block = decoder_layer(text, rows, trained_too, "none", size)
        before += _again(block, rows, width, policy, size)
        moments.append(before - last(policy, load.targets))
    return moments


def _feed_forward(
    rows: int, width: int, hidden: int, trained: bool, policy: Policy, size: int
) -> int:
    """Gradients in a feed-forward layer at their most: of its output, of silu(gate) * up and of
    both factors."""
    gradients = size * rows * (width + 3 * hidden)
    if policy == "pointwise":
        return gradients + size * rows * hidden  # silu(gate), computed again
    return gradients - size * rows * hidden * trained  # a trained down_proj gives up its input


def _again(block: int, rows: int, width: int, policy: Policy, size: int) -> int:
    """What `full` computes again of a block that saves `block` under `none`."""
    if policy != "full":
        return 0
    # in float32 the input that was kept is also the first norm's copy
    return block - (size * rows * width if size == FLOAT32 else 0)

"""How fast this GPU's matrix products, attention and the loss are at the 8B hybrid's shapes: what a
training step cannot beat.

    python -m bench.gpu_ceilings

Everything in bfloat16, forward and backward, in turns. A product of the forward pass has two more
in the backward pass. Attention runs with every backend of `vlm/attention.py` that is there, over
causal segments of the decoder and over windows and frames of the ViT; causal attention counts the
pairs that exist. The ViT's feed-forward is measured as wide as it is and as wide as it is padded
(`vlm.layers.padding`). The loss is that of `vlm/loss.py`, beside one with all logits in float32.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import (
    allocated,
    arguments,
    interleaved,
    print_table,
    ratios,
    seconds,
    write_result,
)
from bench.gpu import DEVICE, DTYPE, ON_GPU, PATCHES, SMALLER, TOKENS, peak, speed, tiny
from bench.make_lengths import hybrid_8b
from vlm.attention import BACKENDS
from vlm.batch import Segments
from vlm.config import VLMConfig
from vlm.layers import padding
from vlm.loss import cross_entropy

ROUNDS, REPEATS = 7, 5
"""Rounds, and calls in each: a call alone is too short to be told from its launch."""
LEARNT = 4096
"""Target rows of the loss."""
Work = Callable[[], object]


def random(*shape: int, learns: bool = True) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=learns)


def timed(works: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each, by round."""

    def measure(work: Work) -> float:
        return seconds(lambda: [work() for _ in range(REPEATS)]) / REPEATS

    measures = {name: lambda work=work: measure(work) for name, work in works.items()}
    interleaved(1, measures)  # warm
    return interleaved(rounds, measures)


def with_backward(forward: Callable[..., Tensor], *inputs: Tensor) -> Work:
    seed = torch.ones_like(forward(*inputs).detach())
    return lambda: torch.autograd.grad(forward(*inputs), inputs, seed)


def products(config: VLMConfig, share: int, rounds: int) -> list[dict]:
    vision, text = config.vision, config.text
    heads, shared = (
        text.head_dim * n for n in (text.num_attention_heads, text.num_key_value_heads)
    )
    tokens, patches, d = TOKENS // share, PATCHES // share, vision.hidden_size
    wide = vision.intermediate_size + padding(vision.intermediate_size, "cuda")
    shapes = {
        "decoder, queries": (tokens, text.hidden_size, heads),
        "decoder, keys": (tokens, text.hidden_size, shared),
        "decoder, gate": (tokens, text.hidden_size, text.intermediate_size),
        "decoder, down": (tokens, text.intermediate_size, text.hidden_size),
        "head": (LEARNT // share, text.hidden_size, text.vocab_size),
        "ViT, qkv": (patches, d, 3 * d),
        "ViT, gate": (patches, d, vision.intermediate_size),
        "ViT, gate, padded": (patches, d, wide),
        "ViT, down": (patches, vision.intermediate_size, d),
        "ViT, down, padded": (patches, wide, d),
        "merger": (patches // 4, 4 * d, 4 * d),
    }
    inputs = {n: (random(rows, k), random(m, k)) for n, (rows, k, m) in shapes.items()}
    taken = timed({name: with_backward(F.linear, *pair) for name, pair in inputs.items()}, rounds)
    rows = []
    for name, (count, k, m) in shapes.items():
        row = {"product": name, "rows x in x out": f"{count} x {k} x {m}"}
        rows.append(row | speed(3 * 2 * count * k * m, taken[name]))
    return rows


def attention(config: VLMConfig, share: int, rounds: int) -> list[dict]:
    text, vision = config.text, config.vision
    tokens, patches = TOKENS // share, PATCHES // share
    decoder = text.num_attention_heads, text.num_key_value_heads, text.head_dim, True
    tower = vision.num_heads, vision.num_heads, vision.head_dim, False
    ragged = [tokens // 2, tokens // 4, *[tokens // 32] * 8]
    cases = {
        "decoder, one sample": ([tokens], *decoder),
        "decoder, eight": ([tokens // 8] * 8, *decoder),
        "decoder, ragged": (ragged, *decoder),
        "ViT, windows": ([64 // share] * (patches // (64 // share)), *tower),
        "ViT, frames": ([patches // 4] * 4, *tower),
    }
    rows = []
    for name, (lengths, heads, shared, width, causal) in cases.items():
        total, segments = sum(lengths), Segments.of(lengths).to(DEVICE)
        q = random(total, heads, width)
        k, v = random(total, shared, width), random(total, shared, width)

        told = {"segments": segments, "causal": causal}
        ways = {backend: partial(BACKENDS[backend], **told) for backend in backends()}
        taken = timed({name: with_backward(way, q, k, v) for name, way in ways.items()}, rounds)
        pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
        for backend, times in taken.items():
            row = {"attention": name, "backend": backend}
            rows.append(row | speed(3 * 2 * 2 * heads * width * pairs, times))
    return rows


def backends() -> list[str]:
    """Those that can run here."""
    found = ["sdpa"]
    if ON_GPU and importlib.util.find_spec("torch.nn.attention.varlen"):
        found.append("torch_varlen")
    if ON_GPU and importlib.util.find_spec("flash_attn"):
        found.append("flash_attn")
    return found


def loss(config: VLMConfig, share: int, rounds: int) -> list[dict]:
    count, width, vocabulary = LEARNT // share, config.text.hidden_size, config.text.vocab_size
    hidden, head = random(count, width), random(vocabulary, width)
    targets = torch.randint(0, vocabulary, (count,), device=DEVICE)

    def chunked() -> object:
        return torch.autograd.grad(cross_entropy(hidden, head, targets).sum, (hidden, head))

    def naive() -> object:
        whole = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")
        return torch.autograd.grad(whole, (hidden, head))

    works = {"all logits": naive, "chunked": chunked}
    taken = timed(works, rounds)
    flops = 3 * 2 * count * width * vocabulary
    rows = []
    for name, work in works.items():
        row = {"loss": name, "targets": count, **speed(flops, taken[name])}
        row["peak GB beside weights"] = round(allocated(work)[1] / 1e9, 3)
        rows.append(row | {"times all logits": ratios(taken["all logits"], taken[name])})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("gpu_ceilings", __doc__).parse_args(argv)
    options.quick = options.quick or not ON_GPU
    config = tiny() if options.quick else hybrid_8b()
    share, rounds = (SMALLER, 1) if options.quick else (1, ROUNDS)
    figures = {}
    for part in (products, attention, loss):
        figures[part.__name__] = part(config, share, rounds)
        print_table(figures[part.__name__])
        print()
    write_result(
        "gpu_ceilings",
        options,
        what="matrix products, attention and loss of the 8B hybrid, forward and backward, bfloat16",
        target={},
        figures=figures | {"peak TFLOP/s": peak()},
        spread=f"least and most of {rounds} interleaved rounds of {REPEATS} calls",
        refuted_by="python -m bench.gpu_ceilings on an idle H100 or H200: a padded product that is "
        "slower, or a backend that is faster than the one chosen",
    )


if __name__ == "__main__":
    sys.exit(main())

"""Decoding with a key/value cache: prompts of any length side by side, greedy or sampled.

The prompts run packed, as in training. Their keys and values then move into one padded cache
per layer, and every further step adds one token to each sample.

Legend: B samples, L cache slots, H heads, K key/value heads, E head_dim.
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import Batch
from vlm.model import VisionLanguageModel, packed_attention


@torch.inference_mode()
def generate(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue every sample of a packed batch of prompts.

    Args:
        stop_ids: a sample ends at the first of these tokens, which is not returned.
        temperature: 0 is greedy; else logits are divided by it and sampled.
        top_p: sample from the smallest set of tokens whose probability reaches it
            (nucleus sampling, arXiv:1904.09751).
        on_token: called as (sample, token id) for each token as it is chosen.

    Returns:
        The new token ids of each sample, at most `max_new_tokens` of them.
    """
    device = batch.input_ids.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = KVCache(batch.segments.lengths, max_new_tokens, device)
    prompt_attention = packed_attention(batch.segments)

    def prefill(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.fill(layer, k, v)
        return prompt_attention(layer, q, k, v)

    last_rows = batch.segments.cu_seqlens[1:].long() - 1
    hidden = model.decode(batch, prefill, last_rows)
    # text after the prompt goes on at the largest position of any axis + 1
    ends = [p.max() + 1 for p in batch.position_ids.split(batch.segments.lengths, dim=1)]
    positions = torch.stack(ends)

    outputs: list[list[int]] = [[] for _ in batch.segments.lengths]
    running = set(range(len(outputs)))
    for step in range(max_new_tokens):
        logits = F.linear(hidden, model.head_weight).float()
        tokens = _choose(logits, temperature, top_p, generator)
        for sample, token in enumerate(tokens.tolist()):
            if sample not in running:
                continue
            if token in stop_ids:
                running.discard(sample)
                continue
            outputs[sample].append(token)
            if on_token:
                on_token(sample, token)
        if not running or step == max_new_tokens - 1:
            break
        decoder = model.language_model
        x = decoder.embed_tokens(tokens)
        x = decoder(x, (positions + step).expand(3, -1), cache.extend)
        cache.advance()
        hidden = decoder.norm(x)
    return outputs


def _choose(logits: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    """(B, vocab) float32 -> (B,) token ids."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, choice).squeeze(1)


class KVCache:
    """Keys and values of every layer, (B, L, K, E), samples padded on the right."""

    def __init__(self, lengths: tuple[int, ...], room: int, device: torch.device | str) -> None:
        self.lengths = lengths
        self.filled = torch.tensor(lengths, device=device)  # (B,) slots in use
        self.longest = max(lengths)
        self.slots = self.longest + room
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take the packed (T, K, E) keys and values of the prompts."""
        padded = []
        for packed in (k, v):
            store = packed.new_zeros(len(self.lengths), self.slots, *packed.shape[1:])
            for sample, rows in enumerate(packed.split(self.lengths)):
                store[sample, : len(rows)] = rows
            padded.append(store)
        self.layers[layer] = tuple(padded)

    def extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token per sample, q (B, H, E), over all of its sample."""
        keys, values = self.layers[layer]
        samples = torch.arange(len(self.filled), device=q.device)
        keys[samples, self.filled], values[samples, self.filled] = k, v
        end = self.longest + 1
        seen = torch.arange(end, device=q.device) <= self.filled[:, None]  # (B, end)
        out = F.scaled_dot_product_attention(
            q[:, :, None],
            keys[:, :end].transpose(1, 2),
            values[:, :end].transpose(1, 2),
            attn_mask=seen[:, None, None],
            enable_gqa=True,
        )
        return out.squeeze(2)

    def advance(self) -> None:
        """Count the token that every layer has taken."""
        self.filled = self.filled + 1
        self.longest += 1

"""The hybrid: vision tower, merger and decoder, over one packed micro-batch.

Legend: T tokens, N rows asked for, V visual tokens, D hidden size.
"""

import torch
from torch import Tensor, nn

from vlm.attention import varlen_attention
from vlm.batch import Batch, Segments
from vlm.config import TextConfig, VLMConfig
from vlm.recompute import Policy, check_policy
from vlm.text import Attend, TextDecoder
from vlm.vision import VisionTower


class LanguageModel(nn.Module):
    """A decoder with its head: a language donor, under the same names as in the hybrid."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"language_model": TextDecoder(config)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, D)."""
        tied = self.config.tie_word_embeddings
        return self.model["language_model"].embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, input_ids: Tensor, segments: Segments, rows: Tensor) -> Tensor:
        """Normalised hidden states (N, D) at `rows` of packed texts (T,)."""
        decoder = self.model["language_model"]
        positions = torch.cat([torch.arange(n) for n in segments.lengths]).to(input_ids.device)
        attend = packed_attention(segments)
        x = decoder.embed_tokens(input_ids)
        return decoder.norm(decoder(x, positions.expand(3, -1), attend, rows))


def packed_attention(segments: Segments) -> Attend:
    """Causal attention inside each segment."""

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, segments, causal=True)

    return attend


class VisionLanguageModel(nn.Module):
    """State-dict keys are the checkpoint's: `model.visual.*`, `model.language_model.*`,
    and `lm_head.weight` unless the head is tied to the embedding."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {"visual": VisionTower(config.vision), "language_model": TextDecoder(config.text)}
        )
        if not config.text.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def visual(self) -> VisionTower:
        return self.model["visual"]

    @property
    def language_model(self) -> TextDecoder:
        return self.model["language_model"]

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, D)."""
        tied = self.config.text.tie_word_embeddings
        return self.language_model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, batch: Batch) -> Tensor:
        """Normalised hidden states (N, D) at `batch.target_rows`; the loss makes logits of them."""
        return self.decode(batch, packed_attention(batch.segments), batch.target_rows)

    def decode(self, batch: Batch, attend: Attend, rows: Tensor) -> Tensor:
        """Normalised hidden states (len(rows), D) at `rows` (int64), with the given attention."""
        x = self.language_model(self.embed(batch), batch.position_ids, attend, rows)
        return self.language_model.norm(x)

    def embed(self, batch: Batch) -> Tensor:
        """(T, D): token embeddings, with vision features where the media stand."""
        x = self.language_model.embed_tokens(batch.input_ids)
        features = self.visual(batch.patches, batch.vision, batch.features)
        if batch.visual_rows.numel():
            return x.index_copy(0, batch.visual_rows, features.to(x.dtype))
        # Ranks must agree on which gradients exist. An empty sum joins the dummy image to the
        # graph; features times zero would turn an inf into a nan.
        return x + features[:0].sum()

    def set_recompute(self, vit: Policy, llm: Policy) -> None:
        """Activation checkpointing of each tower's blocks, the merger among the ViT's
        (`vlm/recompute.py`)."""
        for policy in (vit, llm):
            check_policy(policy)
        self.visual.recompute, self.language_model.recompute = vit, llm


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """transformers' initialiser: normal(0, std) weights, zero biases, norms of one."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)

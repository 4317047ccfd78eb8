"""One attention over packed sequences, for both towers and every device.

Legend: T rows, H heads, K key/value heads, E head_dim, S segments.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import Segments
from vlm.recompute import pointwise


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Softmax attention inside each segment of a packed sequence, scaled by 1/sqrt(E).

    Args:
        q: (T, H, E); k, v: (T, K, E), where K divides H (grouped-query attention).
        segments: boundaries over the T rows.
        causal: a row sees only itself and earlier rows of its segment.

    Returns:
        (T, H, E), dtype of q.
    """
    return BACKENDS[backend(q.device.type, q.dtype)](q, k, v, segments, causal)


@cache
def backend(device_type: str, dtype: torch.dtype) -> str:
    """The backend for a device and dtype: `flash_attn`, `torch_varlen` or `sdpa`."""
    if device_type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        if importlib.util.find_spec("flash_attn"):
            return "flash_attn"
        if importlib.util.find_spec("torch.nn.attention.varlen"):
            return "torch_varlen"
    return "sdpa"


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = segments.cu_seqlens, segments.max_length
    # torch's switch does not reach a package's kernels
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = {"causal": causal, "deterministic": deterministic}
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups, options = q.shape[1] // k.shape[1], {}
    if groups > 1 and _knows_groups(varlen_attn):
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        k, v = (pointwise(lambda x: x.repeat_interleave(groups, dim=1), x) for x in (k, v))
    cu, longest = segments.cu_seqlens, segments.max_length
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window, **options)


@cache
def _knows_groups(kernel: Callable) -> bool:
    return "enable_gqa" in inspect.signature(kernel).parameters


def _grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """One SDPA call per distinct segment length: a ViT has thousands of equal windows."""
    groups, restore = segments.by_length
    outputs = []
    for length, rows in groups:
        batch = [x if rows is None else x[rows] for x in (q, k, v)]
        # (n * L, heads, E) -> (n, heads, L, E)
        batch = [x.unflatten(0, (-1, length)).transpose(1, 2) for x in batch]
        out = F.scaled_dot_product_attention(*batch, is_causal=causal, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if len(outputs) == 1:
        return outputs[0]
    joined = torch.cat(outputs)
    return joined if restore is None else joined[restore]


BACKENDS = {"flash_attn": _flash_attn, "torch_varlen": _torch_varlen, "sdpa": _grouped_sdpa}

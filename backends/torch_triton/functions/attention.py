"""Attention with ONNX's masks, and rotary embeddings.

Q is [B, Hq, S, D], K [B, Hkv, T, D], V [B, Hkv, T, Dv], with Hkv dividing Hq.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

HALVES = (torch.float16, torch.bfloat16)
MAX_HEAD = 256  # elements; more than flash attention has


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, S, H D] as [B, H, S, D]."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] as [B, S, H D]."""
    return x.transpose(1, 2).flatten(2)


def combined_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    past: torch.Tensor | None,
    lengths: torch.Tensor | None,
    is_causal: bool,
    left: int,
    right: int,
) -> torch.Tensor:
    """A boolean mask if `mask` is none or boolean, else an additive one; it broadcasts to [B, Hq, S, T].

    Query i stands at place i + offset among the keys: the offset is the length of the past, or (with key lengths and no
    past) the number of valid keys less that of the queries, or 0.

    Args:
        mask: Broadcasts to [B, Hq, S, T]; one shorter than T forbids the rest.
        lengths: [B], keys beyond are padding.
        left, right: Window sizes, -1 for no bound.
    """
    rows, columns = query.shape[2], key.shape[2]
    at = torch.arange(columns, device=query.device)
    places = torch.arange(rows, device=query.device)[:, None]
    if past is not None:
        places = places + past.shape[2]
    elif lengths is not None:
        places = places + (lengths.reshape(-1, 1, 1, 1) - rows)
    allowed: torch.Tensor | None = None
    for bound in (
        at <= places if is_causal else None,
        at <= places + right if right >= 0 else None,
        at >= places - left if left >= 0 else None,
        at < lengths.reshape(-1, 1, 1, 1) if lengths is not None else None,
    ):
        allowed = bound if allowed is None else allowed if bound is None else allowed & bound
    if mask is None:
        assert allowed is not None
        return allowed
    missing = columns - mask.shape[-1]
    if missing > 0 and mask.shape[-1] != 1:
        fill: Any = False if mask.dtype is torch.bool else -math.inf
        mask = F.pad(mask, (0, missing), value=fill)
    if allowed is None:
        return mask
    return mask & allowed if mask.dtype is torch.bool else mask.masked_fill(~allowed, -math.inf)


def empty_rows(mask: torch.Tensor) -> torch.Tensor:
    """[..., S, 1], true where a query may attend nothing; attention gives 0 there."""
    return ~mask.any(-1, keepdim=True) if mask.dtype is torch.bool else (mask == -math.inf).all(-1, keepdim=True)


def lifted(mask: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """The mask with empty rows opened, whose softmax would be NaN in some kernels."""
    return mask | empty if mask.dtype is torch.bool else mask.masked_fill(empty, 0.0)


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """scaled_dot_product_attention whose key heads serve several query heads each.

    On a GPU flash attention takes them so: half precision, no mask, heads of one size up to 256. Of the other kernels
    that torch chooses by default most do not, and it falls back to products that write all scores to memory; so keys
    and values are repeated for them.
    """
    sizes = query.shape[-1], value.shape[-1]
    flash = query.dtype in HALVES and attn_mask is None and sizes[0] == sizes[1] <= MAX_HEAD
    groups = query.shape[1] // key.shape[1]
    shared = groups != 1 if isinstance(groups, int) else True  # numbers of heads that are symbols stay open
    if shared and query.is_cuda and not flash:
        key, value, shared = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=shared
    )


def attend_in_steps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    soft_cap: float,
    softmax_dtype: torch.dtype | None,
    stage: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and its logits (stage 0), capped (1), masked (2), or its weights (3)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = torch.matmul(query * math.sqrt(factor), key.transpose(-1, -2) * math.sqrt(factor))
    capped = soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
    masked = capped
    if mask is not None:
        masked = capped.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else capped + mask
    weights = torch.softmax(masked if softmax_dtype is None else masked.to(softmax_dtype), -1).to(query.dtype)
    if mask is not None:
        weights = weights.masked_fill(empty_rows(mask), 0.0)
    return torch.matmul(weights, value), (logits, capped, masked, weights)[stage]


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    size: int,
    interleaved: bool,
    heads: int,
) -> torch.Tensor:
    """RotaryEmbedding: pairs (x1, x2) become (cos x1 - sin x2, sin x1 + cos x2).

    Args:
        x: [B, H, S, D], or [B, S, H D] with `heads`.
        cos, sin: [B, S, size / 2], or [positions, size / 2] with `positions` [B, S].
        size: How much of D turns, 0 for all.
        interleaved: Pairs are neighbours, else the two halves.
    """
    packed = x.ndim == 3
    if packed:
        x = split_heads(x, heads)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = size or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., : size // 2], turned[..., size // 2 :]
    real, imaginary = first * cos - second * sin, first * sin + second * cos
    if interleaved:
        turned = torch.stack((real, imaginary), -1).flatten(-2)
    else:
        turned = torch.cat((real, imaginary), -1)
    result = torch.cat((turned, rest), -1) if rest.shape[-1] else turned
    return merge_heads(result) if packed else result

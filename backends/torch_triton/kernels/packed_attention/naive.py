"""What packed attention computes: each sequence by itself."""

from __future__ import annotations

import itertools

import torch

from xform.backends.torch_triton.functions.attention import grouped_attention


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float | None,
    is_causal: bool,
) -> torch.Tensor:
    """Attention within sequences that stand one behind the other.

    Args:
        query: [T, Hq, D]; key, value: [T, Hk, D], with Hk dividing Hq.
        starts: int32 [N + 1], where each sequence begins, then T.
        longest: Length of the longest sequence.

    Returns:
        [T, Hq, D].
    """
    result = torch.zeros_like(query)
    bounds = starts.tolist()
    for begin, end in itertools.pairwise(bounds):
        if begin == end:
            continue
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
        found = grouped_attention(q, k, v, is_causal=is_causal, scale=scale)
        result[begin:end] = found[0].transpose(0, 1)
    return result

"""Padding-free attention over packed sequences, through torch's variable-length flash attention."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from xform.backends.torch_triton.kernels import common
from xform.backends.torch_triton.kernels.packed_attention import naive

_HALVES = (torch.float16, torch.bfloat16)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float | None,
    is_causal: bool,
) -> torch.Tensor:
    """See `naive.packed_attention`. Flash attention on a GPU in half precision; elsewhere sequence by sequence."""
    if query.is_cuda and query.dtype in _HALVES:
        from torch.nn.attention.varlen import varlen_attn

        found = varlen_attn(
            query, key, value, starts, starts, longest, longest, scale=scale,
            window_size=(-1, 0) if is_causal else (-1, -1), enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        assert isinstance(found, torch.Tensor)
        return found
    return naive.packed_attention(query, key, value, starts, longest, scale, is_causal)


def pack(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Drop the padding.

    Args:
        x: [B, S, ...]; mask: [B, S], true for tokens.

    Returns:
        The tokens [T, ...], their places in the flat [B S], the starts of `packed_attention`, the longest length.
    """
    lengths = mask.sum(1, dtype=torch.int32)
    places = torch.nonzero(mask.reshape(-1)).reshape(-1)
    starts = torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1).index_select(0, places), places, starts, int(lengths.max())


def unpack(tokens: torch.Tensor, places: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Tokens [T, ...] back at their places in [B, S, ...], zeros elsewhere."""
    padded = tokens.new_zeros((batch * length, *tokens.shape[1:]))
    return padded.index_copy(0, places, tokens).unflatten(0, (batch, length))


def fuse(module: GraphModule) -> list[common.Finding]:
    """Nothing is packed by itself: that the padding does not matter is known only to the caller."""
    return []


KERNEL = common.Kernel("packed_attention", packed_attention, naive.packed_attention, fuse)

"""Padding-free attention over packed sequences, through torch's variable-length flash attention."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from xform.backends.torch_triton.functions.attention import HALVES
from xform.backends.torch_triton.kernels import common
from xform.backends.torch_triton.kernels.packed_attention import naive
from xform.backends.torch_triton.kernels.packed_attention.match import fuse


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
    if query.is_cuda and query.dtype in HALVES:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        if query.shape[1] != key.shape[1] and "enable_gqa" in signature(varlen_attn).parameters:
            options["enable_gqa"] = True  # before torch 2.12 shared key heads are taken without it
        if is_causal:
            options["window_size"] = (-1, 0)
        found = varlen_attn(query, key, value, starts, starts, longest, longest, **options)
        assert isinstance(found, torch.Tensor)
        return found
    return naive.packed_attention(query, key, value, starts, longest, scale, is_causal)


KERNEL = common.Kernel("packed_attention", packed_attention, naive.packed_attention, fuse, order=1)

"""What the kernel computes."""

from __future__ import annotations

import torch

from xform.backends.torch_triton.functions.attention import rotary


def rotary_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of queries and keys.

    Args:
        query: [B, Hq, S, D]; key: [B, Hk, S, D]; views of one packed product too.
        cos, sin: [B, S, R / 2] or [1, S, R / 2], with R <= D; what lies beyond R passes unchanged.
        interleaved: Pairs are neighbours, else the halves of the first R elements.
    """
    size = 2 * cos.shape[-1]
    turned = [rotary(x, cos, sin, None, size, interleaved, 0) for x in (query, key)]
    return turned[0], turned[1]

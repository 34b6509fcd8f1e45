"""Attention of rows that were packed: between sequences where the mask says padding, else through the padded form.

What a mask means is settled when the graph runs, once for all layers that share it. Exporters spell masks in many ways,
and a window wider than a short example would look like none, so a proof on the graph would have to know every spelling
and all sizes. The check reads the mask once and costs no wait of its own: the number of tokens is waited for anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from xform.backends.torch_triton.functions.attention import (
    HALVES,
    MAX_HEAD,
    empty_rows,
    grouped_attention,
    lifted,
    merge_heads,
)

_CLOSED = -1e4  # a mask at most this low leaves a weight of exp(-10000), which is 0 in every dtype here


class Plan(NamedTuple):
    """Where sequences lie among packed rows.

    Attributes:
        starts: int32, where each begins, then the number of rows.
        longest: Length of the longest, at least 2.
        is_causal: Whether a token sees only those before it.
    """

    starts: torch.Tensor
    longest: int
    is_causal: bool


def plan(valid: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> Plan | None:
    """Sequences of the packed rows, None if the mask is more than padding (and the future).

    Args:
        valid: [B S], true for packed positions; the first always is, whether a token or not.
        places: [B, S], only for the sizes.
        mask: Of attention, broadcasts to [B, H, S, S].
    """
    batch, length = places.shape
    is_bool = mask.dtype is torch.bool
    allowed = mask if is_bool else mask == 0
    tokens = valid.reshape(batch, length).clone()
    steps = torch.arange(length, device=mask.device)
    last = (tokens[0] * steps).max()  # the query of the first sequence that sees most
    grid = allowed.expand(*allowed.shape[:2], length, length)
    tokens[0, 0] = grid[0, 0].index_select(0, last[None])[0, 0]
    keys = tokens[:, None, None, :]
    ignored = ~tokens[:, None, :, None]
    full = ((allowed == keys) | ignored).all()
    causal = ((grid == (keys & (steps <= steps[:, None]))) | ignored).all()
    sharp = torch.ones_like(full) if is_bool else (allowed | (mask <= _CLOSED)).all()
    alone = ~tokens[0, 0]  # then the first row is no token, and a sequence of its own
    lengths = torch.cat((alone[None], tokens.sum(1)))
    starts = F.pad(torch.cumsum(lengths, 0), (1, 0)).to(torch.int32)
    is_full, is_causal, is_sharp, longest = torch.stack((full, causal, sharp, lengths.max())).tolist()
    if not is_sharp or not (is_full or is_causal):
        return None
    # with one query for each sequence flash attention lays shared key heads out by the number of sequences, which
    # fails where one is empty
    return Plan(starts, max(longest, 2), not is_full)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: tuple[int, int],
    found: Plan | None,
    rows: torch.Tensor,
    places: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Attention of packed rows.

    Args:
        query: [T, Hq D]; key: [T, Hk D]; value: [T, Hk Dv].
        heads: Hq and Hk.
        found: What `plan` gave.
        rows: [T], the flat position of each row.
        places: [B, S], the row of each position; any row where there is no token.
        mask: As for `plan`.

    Returns:
        [T, Hq Dv].
    """
    from xform.backends.torch_triton.kernels.packed_attention.kernel import packed_attention

    parts = [x.unflatten(-1, (count, -1)) for x, count in zip((query, key, value), (*heads, heads[1]), strict=True)]
    if found is not None and _has_kernel(parts[0], parts[2]):
        q, k, v = parts
        return packed_attention(q, k, v, found.starts, found.longest, scale, found.is_causal).flatten(1)
    q, k, v = (part[places.reshape(-1)].unflatten(0, places.shape).transpose(1, 2) for part in parts)
    empty = empty_rows(mask)
    result = grouped_attention(q, k, v, lifted(mask, empty), scale=scale)
    return merge_heads(torch.where(empty, 0.0, result)).flatten(0, 1).index_select(0, rows)


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether sequences of different lengths go through one kernel; on a CPU each by itself is as good."""
    if not query.is_cuda:
        return True
    size = query.shape[-1]
    return query.dtype in HALVES and size == value.shape[-1] and size % 8 == 0 and size <= MAX_HEAD

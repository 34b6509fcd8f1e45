"""Attention and rotary embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch.fx import Node

from xform.backends.torch_triton.functions import attention
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers
from xform.graph.values import Array

_CLOSED = -1e4  # a mask at most this low leaves a weight of exp(-10000), which is 0 in every dtype here


@lowers("Attention", since=23)
def attend(site: Site) -> Any:
    """softmax(softcap(scale Q K^T) + mask) V; see `functions.attention` for the masks."""
    query, key, value = _heads(site)
    if site.has(4):
        key = site.call(torch.cat, [site.tensor(4), key], 2)
        value = site.call(torch.cat, [site.tensor(5), value], 2)
    stages = site.wants(3) or bool(site.attr("softcap", 0.0)) or bool(site.attr("softmax_precision", 0))
    result, weights = _staged(site, query, key, value) if stages else (_fused(site, query, key, value), None)
    if site.rank(0) == 3:
        result = site.call(attention.merge_heads, result)
    return result, key, value, weights


def _heads(site: Site) -> tuple[Node, Node, Node]:
    """Q, K and V with the heads as second axis."""
    query, key, value = (site.tensor(i) for i in range(3))
    if site.rank(0) != 3:
        return query, key, value
    counts = site.attr("q_num_heads"), site.attr("kv_num_heads"), site.attr("kv_num_heads")
    split = [site.call(attention.split_heads, x, n) for x, n in zip((query, key, value), counts, strict=True)]
    return split[0], split[1], split[2]


def _grouped(site: Site) -> bool:
    """Whether several query heads share a key head, as far as one can tell."""
    if site.rank(0) == 3:
        return bool(site.attr("q_num_heads") != site.attr("kv_num_heads"))
    query, key = site.shape(0), site.shape(1)
    return query is None or key is None or query[1] != key[1]


def _mask(site: Site, query: Node, key: Node, *, is_causal: bool) -> Node | None:
    """Everything that bounds attention, as one mask; None if nothing does."""
    windows = site.attr("left_window_size", -1), site.attr("right_window_size", -1)
    if not (site.has(3) or site.has(6) or is_causal or windows != (-1, -1)):
        return None
    plain = site.has(3) and not (site.has(6) or is_causal or windows != (-1, -1))
    mask, keys = site.shape(3), site.shape(1)
    if plain and not site.has(4) and mask is not None and keys is not None and mask[-1] == keys[-2]:
        return site.tensor(3)
    past = site.tensor(4) if site.has(4) else None
    return site.call(attention.combined_mask, query, key, site.optional(3), past, site.optional(6), is_causal, *windows)


def _fused(site: Site, query: Node, key: Node, value: Node) -> Node:
    """Through torch's own attention kernels, of which the fastest take no mask."""
    is_causal = bool(site.attr("is_causal", 0))
    meaning = _meaning(site)
    windows = site.attr("left_window_size", -1), site.attr("right_window_size", -1)
    alone = not (site.has(4) or site.has(6)) and windows == (-1, -1)
    alone = alone and (meaning is not None if site.has(3) else is_causal)
    is_causal = is_causal or meaning == "causal"
    mask = None if alone else _mask(site, query, key, is_causal=is_causal)
    options: dict[str, Any] = {}
    if mask is not None:
        options["attn_mask"] = mask
    if alone and is_causal:
        options["is_causal"] = True
    if site.attr("scale") is not None:
        options["scale"] = site.attr("scale")
    attend = attention.grouped_attention if _grouped(site) else F.scaled_dot_product_attention
    bounded = site.has(6) or site.attr("left_window_size", -1) >= 0 or not _full(site)
    if mask is not None and bounded:  # a row that may attend nothing is 0, which not every kernel of torch keeps to
        empty = site.once(attention.empty_rows, mask)
        options["attn_mask"] = site.once(attention.lifted, mask, empty)
        result = site.call(attend, query, key, value, **options)
        return site.call(torch.where, empty, 0.0, result)  # keeps the strides, so the merge of heads stays a view
    return site.call(attend, query, key, value, **options)


def _meaning(site: Site) -> str | None:
    """What a constant mask says: "all" may be seen, only the past is ("causal"), or something else (None)."""
    allowed, query, keys = _allowed(site), site.shape(0), site.shape(1)
    if allowed is None or query is None or keys is None or site.has(4):
        return None
    if allowed.all():
        return "all" if allowed.shape[-1] == keys[-2] or allowed.shape[-1] == 1 else None
    rows, columns = allowed.shape[-2:] if allowed.ndim > 1 else (1, 1)
    if rows != columns or (rows, columns) != (query[-2], keys[-2]):
        return None
    return "causal" if np.array_equal(allowed, np.broadcast_to(np.tri(rows, dtype=bool), allowed.shape)) else None


def _allowed(site: Site) -> Array | None:
    """A constant mask as booleans; None if it is computed, or has other numbers than 0 and such as leave no weight."""
    known = site.known(3)
    if known is None or known.dtype.kind == "b":
        return known
    if known.dtype.kind != "f":
        return None
    allowed = known == 0
    return allowed if bool((allowed | (known <= _CLOSED)).all()) else None


def _full(site: Site) -> bool:
    """Whether no row of the mask can be empty: a constant that closes nothing for good, or leaves something in each."""
    known = site.known(3)
    if known is None or known.dtype.kind not in "bf":
        return False
    if bool((known if known.dtype.kind == "b" else known > -1e38).all()):
        return True
    elsewhere = bool(site.attr("is_causal", 0)) or site.attr("right_window_size", -1) >= 0
    return not elsewhere and bool((known if known.dtype.kind == "b" else known > _CLOSED).any(-1).all())


def _staged(site: Site, query: Node, key: Node, value: Node) -> tuple[Node, Node]:
    """Step by step, where a soft cap or the weights are asked for."""
    mask = _mask(site, query, key, is_causal=bool(site.attr("is_causal", 0)))
    precision = site.attr("softmax_precision", 0)
    dtype = site.torch_dtype(ir.DataType(precision)) if precision else None
    result = site.call(
        attention.attend_in_steps, query, key, value, mask, site.attr("scale"), site.attr("softcap", 0.0), dtype,
        site.attr("qk_matmul_output_mode", 0),
    )  # fmt: skip
    first, second = site.pick(result, 2)
    return first, second


@lowers("RotaryEmbedding", since=23)
def rotary(site: Site) -> Any:
    x, cos, sin, positions = site.tensor(0), site.tensor(1), site.tensor(2), site.optional(3)
    how = site.attr("rotary_embedding_dim", 0), bool(site.attr("interleaved", 0)), site.attr("num_heads", 0)
    return site.call(attention.rotary, x, cos, sin, positions, *how)

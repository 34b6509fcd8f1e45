"""Attention and rotary embeddings."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch.fx import Node

from xform.backends.torch_triton.functions import attention
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers


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
    """Through torch's own attention kernels."""
    is_causal = bool(site.attr("is_causal", 0))
    alone = is_causal and not any(site.has(i) for i in (3, 4, 6))
    alone = alone and (site.attr("left_window_size", -1), site.attr("right_window_size", -1)) == (-1, -1)
    mask = None if alone else _mask(site, query, key, is_causal=is_causal)
    options: dict[str, Any] = {}
    if mask is not None:
        options["attn_mask"] = mask
    if alone:
        options["is_causal"] = True
    if site.attr("scale") is not None:
        options["scale"] = site.attr("scale")
    if _grouped(site):
        options["enable_gqa"] = True
    bounded = site.has(6) or site.attr("left_window_size", -1) >= 0 or not _full(site)
    if mask is not None and bounded:  # a row that may attend nothing is 0, which not every kernel of torch keeps to
        empty = site.once(attention.empty_rows, mask)
        options["attn_mask"] = site.once(attention.lifted, mask, empty)
        result = site.call(F.scaled_dot_product_attention, query, key, value, **options)
        return site.call(torch.Tensor.masked_fill, result, empty, 0.0)
    return site.call(F.scaled_dot_product_attention, query, key, value, **options)


def _full(site: Site) -> bool:
    """Whether no row of the mask can be empty: a float mask without infinities."""
    known = site.known(3)
    return known is not None and known.dtype.kind == "f" and bool((known > -1e38).all())


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

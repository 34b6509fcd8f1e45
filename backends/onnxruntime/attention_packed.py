"""Self-attention with its projections in one operator: com.microsoft.Attention.

    Y = Attention(X [B, S, C], W [C, 3 * H * D], b [3 * H * D], bias)

The kernel makes queries, keys and values of all heads in one pass over the weights, each written where the products of
the attention read it, so that Split, Slice, Squeeze, Reshape and Transpose vanish. Measured (docs/onnxruntime-notes.md)
it takes 3 to 10 % less than the three products with MultiHeadAttention or with the products written out, with and
without a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from xform.backends.onnxruntime.attention_mask import Lengths, make_bias
from xform.backends.onnxruntime.emit import MICROSOFT, Site
from xform.backends.onnxruntime.projections import Projection, read_projection
from xform.graph.values import is_op, rank_of, same_dim, shape_of

if TYPE_CHECKING:
    from xform.backends.onnxruntime.attention import Operands

FORM = "attention: packed Attention"


def packed_attention(site: Site, a: Operands) -> tuple[ir.Value, int, int] | None:
    """[B, S, H*D] with the number of heads and their size; None where the operator cannot say it.

    It cannot where queries, keys and values are not columns of linear layers on one input, where the products are read
    elsewhere too, or with a soft cap, a cache, another precision, or key heads shared among query heads.
    """
    if a.softcap or a.precision is not None or a.past_key is not None or a.query_heads != a.kv_heads:
        return None
    if a.query.dtype is not ir.DataType.FLOAT or any(rank_of(v) != 4 for v in (a.query, a.key, a.value)):
        return None
    parts = [read_projection(v) for v in (a.query, a.key, a.value)]
    query, key, value = parts
    if query is None or key is None or value is None or not _one_source(site, query, key, value):
        return None
    shape = shape_of(a.query)
    assert shape is not None
    if query.weight.shape != value.weight.shape or query.weight.shape != key.weight.shape:
        return None
    bias = None
    if a.mask is not None:
        if rank_of(a.mask) != 4:
            return None
        causal = Lengths(a.query, a.key, None, a.key) if a.causal else None
        bias = make_bias(site, ir.DataType.FLOAT, a.mask, causal, finds_empty=not a.nan_rows)
        if bias is not None and bias.empty_rows is not None and shape_of(a.mask)[1] != 1:  # type: ignore[index]
            return None  # a row that is empty for some heads cannot be zeroed once the heads are side by side
    tokens = as_tokens(site, query.source, a.query)
    if tokens is None:
        return None
    weight = np.concatenate([p.weight for p in (query, key, value)], axis=1)
    offsets = np.concatenate([p.bias for p in (query, key, value)])
    result = site.op(
        "Attention",
        tokens,
        site.emitter.weight(weight, f"{site.node.name}_qkv_weight"),
        site.emitter.weight(offsets, f"{site.node.name}_qkv_bias"),
        None,
        None,
        None if bias is None or a.mask is None else _full(site, bias.value, a.mask, a),
        domain=MICROSOFT,
        num_heads=a.query_heads,
        scale=a.scale,
        unidirectional=int(a.causal and bias is None) or None,
    )
    result.type = ir.TensorType(ir.DataType.FLOAT)
    if bias is not None and bias.empty_rows is not None:
        empty = site.op("Squeeze", bias.empty_rows, site.emitter.ints(1))  # [B, 1, S, 1] to [B, S, 1]
        result = site.op("Where", empty, site.emitter.constant(0, ir.DataType.FLOAT, "zero"), result)
    return result, a.query_heads, query.weight.shape[1] // a.query_heads


def _one_source(site: Site, *parts: Projection) -> bool:
    """Whether all read one input, and nothing else reads what vanishes."""
    if any(part.source is not parts[0].source for part in parts):
        return False
    return site.takes_in(node for part in parts for node in part.nodes)


def _full(site: Site, bias: ir.Value, mask: ir.Value, a: Operands) -> ir.Value:
    """The bias at full length along queries and keys, as the kernel demands; expanded once for all layers."""
    shape, rows, columns = shape_of(mask), shape_of(a.query), shape_of(a.key)
    assert shape is not None and rows is not None and columns is not None
    wanted = (rows[2], columns[2])
    if a.causal or (shape[2:] == wanted and None not in wanted):
        return bias
    emitter = site.emitter

    def expand() -> ir.Value:
        if isinstance(wanted[0], int) and isinstance(wanted[1], int):
            target = emitter.ints(1, 1, wanted[0], wanted[1])
        else:
            lengths = [
                site.op("Slice", site.op("Shape", v), emitter.ints(2), emitter.ints(3)) for v in (a.query, a.key)
            ]
            target = site.op("Concat", emitter.ints(1, 1), *lengths, axis=0)
        value: ir.Value = site.op("Expand", bias, target)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return value

    expanded: ir.Value = emitter.shared(site.graph, ("full bias", bias, wanted), expand)
    return expanded


def as_tokens(site: Site, source: ir.Value, query: ir.Value) -> ir.Value | None:
    """The input of the projections as [B, S, C]."""
    shape, given = shape_of(query), shape_of(source)
    if shape is None or given is None or len(given) not in (2, 3):
        return None
    # one sequence may stand as [S, 1, C], whose rows are in the same order
    if len(given) == 3 and same_dim(given[0], shape[0]) and same_dim(given[1], shape[2]):
        return source
    maker = source.producer()
    before = maker.inputs[0] if maker is not None and is_op(maker, "Reshape") else None
    if before is not None and rank_of(before) == 3 and shape_of(before)[:2] == (shape[0], shape[2]):  # type: ignore[index]
        return before
    batch, tokens = shape[0], shape[2]
    if not isinstance(batch, int) and not isinstance(tokens, int):
        return None
    dims, width = [dim if isinstance(dim, int) else -1 for dim in (batch, tokens)], given[-1]
    if not isinstance(width, int):
        return None
    value: ir.Value = site.op("Reshape", source, site.emitter.ints(*dims, width))
    return value

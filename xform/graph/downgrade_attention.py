"""Our own body of Attention (opsets 23 to 25), for opsets below and for runtimes without it.

    Y = softmax(softcap(scale Q K^T) + bias) V

with bias the sum of the mask (a boolean one as 0 and -inf), the causal or window bound, and the bound of the cache
length. A row that may attend nothing is 0. Differences from ONNX's body: the scale goes onto Q at once instead of as
square roots onto Q and K, heads are repeated by a Gather, and parts that say nothing are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.downgrade_steps import Unavailable, expand, lower
from xform.graph.opset import opset_of
from xform.graph.opset_emit import Emitter, Names, get_input, replace
from xform.graph.opset_schema import NEWEST_OPSET
from xform.graph.values import Dim, attribute, constant, is_op, rank_of, shape_of

_BOTTOM = -math.inf


@dataclass(frozen=True)
class _Inputs:
    """Q [B, Hq, S, D], K [B, Hkv, T, D] and V [B, Hkv, T, Dv] with the past in front, and what bounds them."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    dtype: ir.DataType
    past: ir.Value | None
    lengths: ir.Value | None


@lower(24, "Attention")
def _attention_24(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Without cache lengths, nothing changed but that a mask may be too short."""
    return None if get_input(node, 6) is None and not _short_mask(node) else attention(node, emit)


@lower(25, "Attention")
def _attention_25(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Without windows, nothing changed."""
    return None if _window(node) == (-1, -1) else attention(node, emit)


@expand("Attention")
def attention(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """The body, for whatever version `node` has."""
    if not emit.expands:
        raise Unavailable("its windows or cache lengths are newer")
    parts = _inputs(node, emit)
    key, value = _repeat_heads(node, emit, parts)
    raw = emit.op("MatMul", _scaled(node, emit, parts), emit.op("Transpose", key, perm=[0, 1, 3, 2]))
    capped = _soft_cap(node, emit, raw, parts.dtype)
    bias = _bias(node, emit, parts)
    biased = capped if bias is None else emit.op("Add", capped, bias)
    weights = _softmax(node, emit, biased, parts.dtype)
    empty = _empty_rows(node, emit, bias, parts.dtype)
    result = emit.op("MatMul", weights, value)
    zero = emit.like(0, parts.dtype, "zero")
    if empty is not None:
        result = emit.op("Where", empty, zero, result)
    if rank_of(node.inputs[0]) == 3:
        width = (shape_of(node.outputs[0]) or (None,))[-1]
        merged = emit.ints([0, 0, width if isinstance(width, int) else -1], "merged")
        result = emit.op("Reshape", emit.op("Transpose", result, perm=[0, 2, 1, 3]), merged)
    outputs = [result]
    if len(node.outputs) > 1:
        outputs.append(_produced(emit, parts.key))
    if len(node.outputs) > 2:
        outputs.append(_produced(emit, parts.value))
    if len(node.outputs) > 3:
        if empty is not None and attribute(node, "qk_matmul_output_mode", 0) == 3:
            weights = emit.op("Where", empty, zero, weights)
        stages = (raw, capped, biased, weights)
        outputs.append(emit.op("Identity", stages[attribute(node, "qk_matmul_output_mode", 0)]))
    return outputs


def written_out(model: ir.Model) -> ir.Model:
    """The model with every Attention that has a mask in elementary operators; the model itself where there is none.

    ONNX Runtime's kernel takes a row of the lowest number for a row of -inf, and refuses masks that broadcast. Nodes
    whose head counts are unknown stay.
    """
    if not any(is_op(node, "Attention") and get_input(node, 3) is not None for node in model.graph.all_nodes()):
        return model
    copy = clone(model)
    names = Names([copy.graph])
    for node in list(copy.graph.all_nodes()):
        if is_op(node, "Attention") and get_input(node, 3) is not None:
            emitter = Emitter(node, opset_of(copy) or NEWEST_OPSET, names)
            try:
                outputs = list(attention(node, emitter) or ())
            except Unavailable:
                continue
            replace(node, emitter, outputs)
    return copy


def _produced(emit: Emitter, value: ir.Value) -> ir.Value:
    return value if value.producer() in emit.nodes else emit.op("Identity", value)


def _inputs(node: ir.Node, emit: Emitter) -> _Inputs:
    query, key, value = node.inputs[:3]
    if query is None or key is None or value is None or query.dtype is None or rank_of(query) not in (3, 4):
        raise Unavailable("the type or rank of its query is unknown")
    if rank_of(query) == 3:
        heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
        query = _split_heads(emit, query, heads[0])
        key, value = _split_heads(emit, key, heads[1]), _split_heads(emit, value, heads[1])
    past_key, past_value = get_input(node, 4), get_input(node, 5)
    if past_key is not None and past_value is not None:
        key = emit.op("Concat", past_key, key, axis=2)
        value = emit.op("Concat", past_value, value, axis=2)
    assert query.dtype is not None
    return _Inputs(query, key, value, query.dtype, past_key, get_input(node, 6))


def _split_heads(emit: Emitter, value: ir.Value, heads: int) -> ir.Value:
    width = (shape_of(value) or (None,))[-1]
    size = width // heads if isinstance(width, int) else -1  # a size that is written down does for empty batches too
    split = emit.op("Reshape", value, emit.ints([0, 0, heads, size], "heads"))
    return emit.op("Transpose", split, perm=[0, 2, 1, 3])


def _head_count(node: ir.Node, value: ir.Value, name: str) -> Dim:
    shape = shape_of(value)
    count = attribute(node, name)
    return count if count else shape[1] if shape is not None else None


def _repeat_heads(node: ir.Node, emit: Emitter, parts: _Inputs) -> tuple[ir.Value, ir.Value]:
    """Every key head serves Hq / Hkv query heads in a row."""
    have, want = _head_count(node, parts.key, "kv_num_heads"), _head_count(node, parts.query, "q_num_heads")
    if have == want and have is not None:
        return parts.key, parts.value
    if not isinstance(have, int) or not isinstance(want, int) or want % have:
        raise Unavailable("the number of its heads is unknown")
    heads = emit.constant(np.repeat(np.arange(have, dtype=np.int64), want // have), "head_of")
    return emit.op("Gather", parts.key, heads, axis=1), emit.op("Gather", parts.value, heads, axis=1)


def _scaled(node: ir.Node, emit: Emitter, parts: _Inputs) -> ir.Value:
    scale = attribute(node, "scale")
    shape = shape_of(parts.query)
    size = shape[-1] if shape is not None else None
    if scale is None and isinstance(size, int):
        scale = 1 / math.sqrt(size)
    if scale is not None:
        return emit.op("Mul", parts.query, emit.like(scale, parts.dtype, "scale"))
    computed = emit.op("Sqrt", emit.op("Cast", _length(emit, parts.query, 3), to=int(ir.DataType.FLOAT)))
    return emit.op("Div", parts.query, emit.op("Cast", computed, to=int(parts.dtype)))


def _soft_cap(node: ir.Node, emit: Emitter, logits: ir.Value, dtype: ir.DataType) -> ir.Value:
    cap = attribute(node, "softcap", 0.0)
    if not cap:
        return logits
    bound = emit.like(cap, dtype, "softcap")
    return emit.op("Mul", emit.op("Tanh", emit.op("Div", logits, bound)), bound)


def _softmax(node: ir.Node, emit: Emitter, logits: ir.Value, dtype: ir.DataType) -> ir.Value:
    precision = attribute(node, "softmax_precision")
    if not precision or precision == dtype:
        return emit.op("Softmax", logits, axis=-1)
    return emit.op("Cast", emit.op("Softmax", emit.op("Cast", logits, to=precision), axis=-1), to=int(dtype))


def _bias(node: ir.Node, emit: Emitter, parts: _Inputs) -> ir.Value | None:
    """What is added to the logits: the mask plus 0 or -inf for every bound, or None."""
    bottom, zero = emit.like(_BOTTOM, parts.dtype, "bottom"), emit.like(0, parts.dtype, "zero")
    terms: list[ir.Value] = []
    mask = get_input(node, 3)
    if mask is not None:
        if mask.dtype is None:
            raise Unavailable("the type of its mask is unknown")
        whole = emit.op("Where", mask, zero, bottom) if mask.dtype == ir.DataType.BOOL else mask
        terms.append(_lengthened(node, emit, whole, parts, bottom))
    forbidden = _forbidden(node, emit, parts)
    terms.extend(emit.op("Where", bound, bottom, zero) for bound in forbidden)
    bias: ir.Value | None = None
    for term in terms:
        bias = term if bias is None else emit.op("Add", bias, term)
    return bias


def _forbidden(node: ir.Node, emit: Emitter, parts: _Inputs) -> list[ir.Value]:
    """Boolean tensors that broadcast to [B, 1, S, T], true where a query may not attend."""
    causal = bool(attribute(node, "is_causal", 0))
    left, right = _window(node)
    lengths = parts.lengths
    found: list[ir.Value] = []
    if not causal and left < 0 and right < 0 and lengths is None:
        return found
    columns = _range(emit, _length(emit, parts.key, 2))
    if lengths is not None:
        lengths = emit.op("Reshape", lengths, emit.ints([-1, 1, 1, 1], "column"))
        found.append(emit.op("Not", emit.op("Less", columns, lengths)))
    if causal or left >= 0 or right >= 0:
        rows = _positions(emit, parts, lengths)
        upper = [0] * causal + [right] * (right >= 0)
        if upper:
            found.append(emit.op("Greater", columns, _plus(emit, rows, min(upper))))
        if left >= 0:
            found.append(emit.op("Less", columns, _plus(emit, rows, -left)))
    return found


def _positions(emit: Emitter, parts: _Inputs, lengths: ir.Value | None) -> ir.Value:
    """Where each query stands among the keys, as a column."""
    count = _length(emit, parts.query, 2)
    rows = emit.op("Unsqueeze", _range(emit, count), emit.ints([1], "axes"))
    if parts.past is not None:
        return emit.op("Add", rows, _length(emit, parts.past, 2))
    return rows if lengths is None else emit.op("Add", rows, emit.op("Sub", lengths, count))


def _lengthened(node: ir.Node, emit: Emitter, mask: ir.Value, parts: _Inputs, bottom: ir.Value) -> ir.Value:
    """A mask shorter than the keys forbids the rest."""
    if not _short_mask(node):
        return mask
    rank = rank_of(mask)
    if rank is None:
        raise Unavailable("the rank of its mask is unknown")
    missing = emit.op("Sub", _length(emit, parts.key, 2), _length(emit, mask, rank - 1))
    pads = emit.op("Concat", emit.ints([0] * (2 * rank - 1)), emit.op("Reshape", missing, emit.ints([1])), axis=0)
    return emit.op("Pad", mask, pads, bottom)


def _short_mask(node: ir.Node) -> bool:
    """Whether the mask of an external cache may be shorter than the keys."""
    mask, keys = shape_of(get_input(node, 3)), shape_of(node.inputs[1])
    if get_input(node, 3) is None or get_input(node, 4) is not None:
        return False
    if get_input(node, 6) is None and (mask is None or keys is None):
        return False
    if mask is None or keys is None:
        return True
    return mask[-1] not in (keys[-2], 1) and isinstance(mask[-1], int) and isinstance(keys[-2], int)


def _empty_rows(node: ir.Node, emit: Emitter, bias: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    """True for rows that may attend nothing; None where there is none: a mask, a window or a length can empty a row."""
    mask = get_input(node, 3)
    if bias is None or (mask is None and get_input(node, 6) is None and _window(node) == (-1, -1)):
        return None
    known = constant(mask, max_elements=1 << 20)
    if known is not None and known.dtype.kind == "f" and np.isfinite(known).all() and get_input(node, 6) is None:
        return None
    greatest = emit.op("ReduceMax", bias, emit.ints([-1], "axes"), keepdims=1)
    return emit.op("Equal", greatest, emit.like(_BOTTOM, dtype, "bottom"))


def _window(node: ir.Node) -> tuple[int, int]:
    return attribute(node, "left_window_size", -1), attribute(node, "right_window_size", -1)


def _length(emit: Emitter, value: ir.Value, axis: int) -> ir.Value:
    """One dim as an int64 scalar."""
    shape = shape_of(value)
    size = shape[axis] if shape is not None else None
    if isinstance(size, int):
        return emit.like(size, ir.DataType.INT64, "length")
    return emit.op("Gather", emit.op("Shape", value), emit.like(axis, ir.DataType.INT64), axis=0)


def _range(emit: Emitter, count: ir.Value) -> ir.Value:
    return emit.op("Range", emit.like(0, ir.DataType.INT64), count, emit.like(1, ir.DataType.INT64))


def _plus(emit: Emitter, value: ir.Value, number: int) -> ir.Value:
    return emit.op("Add", value, emit.like(number, ir.DataType.INT64)) if number else value

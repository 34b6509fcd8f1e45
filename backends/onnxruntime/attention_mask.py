"""The bias that masks make, and the rows that it masks completely.

The standard says: query `i` attends key `j` iff `j <= i + past` when causal, a boolean mask allows where it is true, a
float mask is added, and a row with every key at -inf gives zeros (where a plain softmax gives NaN). The bias and
the flags of such rows are made once for each mask, however many layers read it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.backends.onnxruntime.emit import Site
from xform.graph.masks import MAX_SCANNED, MOVES, never_minus_infinity
from xform.graph.values import constant, constant_tensor, is_op, shape_of


@dataclass(frozen=True)
class Bias:
    """What is added to the logits.

    Attributes:
        value: Float bias that broadcasts to [B, H, S, T].
        empty_rows: Bool [..., S or 1, 1], true where no key is left; None where that cannot happen.
    """

    value: ir.Value
    empty_rows: ir.Value | None


@dataclass(frozen=True)
class Lengths:
    """The values whose dim 2 says how far the causal frontier reaches.

    Attributes:
        query: [B, H, S, D].
        keys: New keys [B, Hkv, N, D].
        past: Past keys [B, Hkv, P, D], or None; the frontier moves by P.
        total: All keys [B, Hkv, T, D], T = P + N.
    """

    query: ir.Value
    keys: ir.Value
    past: ir.Value | None
    total: ir.Value

    def key(self) -> Hashable:
        """What the causal bias depends on; lengths of one name are one length."""
        return tuple(_length_key(value) for value in (self.query, self.keys, self.past))


def make_bias(
    site: Site, dtype: ir.DataType, mask: ir.Value | None, causal: Lengths | None, *, finds_empty: bool = True
) -> Bias | None:
    """The bias of `mask` and the causal rule together, or None when there is neither.

    Args:
        finds_empty: Whether rows without a key are looked for; a plain softmax makes NaN of them.
    """
    if mask is None and causal is None:
        return None
    key = ("bias", mask, dtype, None if causal is None else causal.key(), finds_empty)
    bias: Bias = site.emitter.shared(site.graph, key, lambda: _make_bias(site, dtype, mask, causal, finds_empty))
    return bias


def _make_bias(
    site: Site, dtype: ir.DataType, mask: ir.Value | None, causal: Lengths | None, finds_empty: bool
) -> Bias:
    causal_bias = None if causal is None else _causal_bias(site, dtype, causal)
    if mask is None:
        assert causal_bias is not None
        return Bias(causal_bias, None)
    mask_bias = mask
    if mask.dtype is ir.DataType.BOOL:
        mask_bias = _bias_where(site, mask, dtype)
    total = mask_bias if causal_bias is None else site.op("Add", mask_bias, causal_bias)
    if not finds_empty or (mask.dtype is not ir.DataType.BOOL and never_minus_infinity(mask)):
        return Bias(total, None)
    shape = shape_of(mask)
    assert shape is not None
    if mask.dtype is ir.DataType.BOOL and causal_bias is None:
        # a row is empty where no entry of the mask is true; on the flags this is cheaper than on the floats
        zero = site.emitter.constant(0, ir.DataType.INT32, "zero")
        highest = _largest_of_rows(site, site.op("Cast", mask, to=ir.DataType.INT32), shape, zero)
        return Bias(total, site.op("Equal", highest, zero))
    lowest = site.emitter.constant(-np.inf, dtype, "minus_inf")
    if causal is not None:  # whose frontier is as long as queries and keys are
        shape = (*shape[:-2], *((shape_of(value) or [None] * 4)[2] for value in (causal.query, causal.total)))
    highest = _largest_of_rows(site, total, shape, lowest)
    return Bias(total, site.op("Equal", highest, lowest))


def _largest_of_rows(site: Site, value: ir.Value, shape: Sequence[object], least: ir.Value) -> ir.Value:
    """The largest of each row of `value`, of `shape`, [.., 1]; `least` where a row has no keys.

    ONNX Runtime (1.31) gives what it reduces the shape of its input where that is empty: [0, 1, 1, T] instead of
    [0, 1, 1, 1]. So no row may be empty, and of no rows the last axis is cut.
    """
    ints = site.emitter.ints

    def may_be_empty(*dims: object) -> bool:
        return not all(isinstance(dim, int) and dim for dim in dims)

    if may_be_empty(shape[-1]):
        value = site.op("Pad", value, ints(*[0] * (2 * len(shape) - 1), 1), least)
    largest: ir.Value = site.op("ReduceMax", value, ints(-1), keepdims=1)
    return site.op("Slice", largest, ints(0), ints(1), ints(-1)) if may_be_empty(*shape[:-1]) else largest


def _bias_where(site: Site, allowed: ir.Value, dtype: ir.DataType) -> ir.Value:
    zero = site.emitter.constant(0, dtype, "zero")
    masked = site.emitter.constant(-np.inf, dtype, "minus_inf")
    value: ir.Value = site.op("Where", allowed, zero, masked)
    value.type = ir.TensorType(dtype)
    return value


def _causal_bias(site: Site, dtype: ir.DataType, lengths: Lengths) -> ir.Value:
    """0 where key j <= query i + past, else -inf, shape [S, T]; ONNX Runtime folds it when the lengths are static."""
    emitter = site.emitter
    zero, one = emitter.constant(0, ir.DataType.INT64, "zero"), emitter.constant(1, ir.DataType.INT64, "one")
    rows = site.op("Range", zero, _length(site, lengths.query), one)
    if lengths.past is not None:
        rows = site.op("Add", rows, _length(site, lengths.past))
    columns = site.op("Range", zero, _length(site, lengths.total), one)
    columns, rows = site.op("Unsqueeze", columns, emitter.ints(0)), site.op("Unsqueeze", rows, emitter.ints(1))
    return _bias_where(site, site.op("LessOrEqual", columns, rows), dtype)


def _length(site: Site, value: ir.Value) -> ir.Value:
    """Dim 2 of a 4-D value as an int64 scalar: a constant when static."""
    shape = shape_of(value)
    if shape is not None and isinstance(shape[2], int):
        return site.emitter.constant(shape[2], ir.DataType.INT64, "length")
    index = site.emitter.constant(2, ir.DataType.INT64, "sequence_axis")
    result: ir.Value = site.op("Gather", site.op("Shape", value), index, axis=0)
    return result


def _length_key(value: ir.Value | None) -> Hashable:
    if value is None:
        return None
    shape = shape_of(value)
    dim = None if shape is None else shape[2]
    return value if dim is None else dim


def is_neutral(mask: ir.Value, depth: int = 16) -> bool:
    """Whether a mask provably allows everything and adds nothing: all true, or all zeros, under moves."""
    if constant_tensor(mask) is not None:
        data = constant(mask, max_elements=MAX_SCANNED)
        return data is not None and bool(np.all(data) if data.dtype.kind == "b" else not np.any(data))
    node = mask.producer()
    if node is None or depth == 0 or not is_op(node, *MOVES) or node.inputs[0] is None:
        return False
    return is_neutral(node.inputs[0], depth - 1)

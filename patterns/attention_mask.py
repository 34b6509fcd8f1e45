"""Masks of an attention: the steps between product and softmax, replayed as one additive mask.

Replaying starts from an empty bias and repeats every step on it:

    logits + m           ->  bias + m
    where(c, logits, f)  ->  where(c, bias, f')
    logits * s           ->  bias * s

The first and the last are exact. For the second, masked logits x become x + f' instead of f. With f' = f = -inf both
are -inf. A finite f is replaced by f' = half the lowest number of the type, which is far enough down that x + f' rounds
to f' for every |x| below 1e30. So masked keys get the weight 0 beside any open key, as they did with f, and a row
without an open key gets equal weights, as it did with f. (The lowest number itself would do as well by the definition
of the operator, but ONNX Runtime's kernel takes it for -inf and gives zeros for such a row.) In float16 no number can
swallow logits that well, so there a finite fill needs a condition that is known to leave every row a key.

Masks that are written out with the lowest number, `Where(condition, 0, lowest)` or `(1 - open) * lowest`, get half of
it for the same reason, where nothing but attentions reads them.

A row whose mask is all -inf has weights NaN in the spelled-out form; the operator gives zeros.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, is_op, scalar, shape_of
from xform.patterns.attention_layout import Layout, dim, vector
from xform.patterns.attention_logits import FLOATS, AddMask, Fill, Logits
from xform.rewrite.builder import Builder

MASK_INPUT = 3  # of the Attention operator


def half_lowest(dtype: ir.DataType) -> float:
    """Half of the lowest finite number of a floating-point type."""
    finfo: Any = ml_dtypes.finfo
    return float(finfo(dtype.numpy()).min) / 2


def lowest_fill(mask: ir.Value | None) -> tuple[ir.Node, int] | None:
    """A `Where(condition, a, lowest)` or `Mul(a, lowest)` above an additive mask that only attentions read.

    Returns:
        The node, and which of its inputs is the lowest number of the type.
    """
    stack, seen = [mask], set[ir.Value | None]()
    while stack:
        value = stack.pop()
        node = value.producer() if value is not None else None
        if value is None or node is None or value in seen:
            continue
        seen.add(value)
        if (index := _lowest_input(node)) is not None and _only_masks(node):
            return node, index
        if is_op(node, *_MASK_OPS):
            stack += node.inputs
    return None


_MASK_OPS = ("Where", "Add", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice", "Identity")


def _lowest_input(node: ir.Node) -> int | None:
    dtype = node.outputs[0].dtype
    if not is_op(node, "Where", "Mul") or dtype not in FLOATS:
        return None
    lowest = 2 * half_lowest(dtype)
    return next(
        (i for i, v in enumerate(node.inputs) if v is not None and v.dtype == dtype and scalar(v) == lowest), None
    )


def _only_masks(node: ir.Node) -> bool:
    """Whether everything that `node` computes ends in masks of attentions."""
    stack, seen = list(node.outputs), set[ir.Value]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_output():
            return False
        for user, index in value.uses():
            if is_op(user, "Attention") and index == MASK_INPUT:
                continue
            if not is_op(user, *_MASK_OPS) or (user.op_type == "Where" and index == 0):
                return False
            stack += user.outputs
    return True


def build_mask(
    build: Builder, logits: Logits, layout: Layout, queries: ir.Value, keys: ir.Value, dtype: ir.DataType
) -> ir.Value | None:
    """The additive mask [batch or 1, heads or 1, S, T] of an attention; None where there is none.

    Args:
        queries: [B, H, S, D].
        keys: [B, H, T, D].
        dtype: Type of the logits.
    """
    bias: ir.Value | None = None
    for step in logits.steps:
        if isinstance(step, AddMask):
            mask = layout.lift_mask(build, step.mask, step.view, queries)
            mask = build.op("Neg", mask) if step.negative else mask
            bias = mask if bias is None else build.op("Add", bias, mask)
        elif isinstance(step, Fill):
            condition = layout.lift_mask(build, step.condition, step.view, queries)
            fill = build.constant(_number(step.fill if math.isinf(step.fill) else half_lowest(dtype), dtype))
            open_value = bias if bias is not None else build.constant(_number(0.0, dtype))
            pair = (open_value, fill) if step.keeps else (fill, open_value)
            bias = build.op("Where", condition, *pair)
        elif bias is not None:
            bias = build.op("Mul", bias, step.factor)
    return None if bias is None else spread(build, bias, queries, keys)


def spread(build: Builder, mask: ir.Value, queries: ir.Value, keys: ir.Value) -> ir.Value:
    """`mask` with its last two axes at full length.

    The operator's definition lets them broadcast; ONNX Runtime's kernel does not.
    """
    shape = shape_of(mask)
    wanted = (dim(queries, 2), dim(keys, 2))
    full = [(shape_of(v) or (None,) * 4)[2] for v in (queries, keys)]
    if shape is not None and None not in full and list(shape[-2:]) == full:
        return mask
    return build.op("Expand", mask, vector(build, [1, 1, *wanted]))


def _number(value: float, dtype: ir.DataType) -> Array:
    return np.asarray(value, dtype=dtype.numpy())

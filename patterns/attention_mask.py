"""Masks of an attention: the steps between product and softmax, replayed as one additive mask.

Replaying starts from an empty bias and repeats every step on it:

    logits + m           ->  bias + m
    where(c, logits, f)  ->  where(c, bias, f)
    logits * s           ->  bias * s

The first and the last are exact. The second is exact for the fills that `xform.patterns.attention_fill` lets through:
masked logits x become x + f, which is f.

A row whose mask is all -inf has weights NaN in the spelled-out form, and zeros from the operator. Where such a row may
occur, and no guard makes zeros of its weights, its mask becomes NaN: `Where(ReduceMax(bias) == -inf, NaN, bias)`. What
lowers an attention can tell this form (`xform.graph.masks.without_nan_rows`): a plain softmax needs none of it.

Masks that are written out with the lowest number, `Where(condition, 0, lowest)` or `(1 - open) * lowest`, get 5/8 of
it, where nothing but attentions reads them and nothing else in the mask could be as low. By the definition that is
the same. ONNX Runtime's kernel takes a row of the lowest number for a row of -inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir

from xform.graph.masks import DEEP, MAX_SCANNED
from xform.graph.values import Array, constant, constant_tensor, is_op, same_dim, scalar, shape_of
from xform.patterns.attention_fill import deep_number, may_close_rows
from xform.patterns.attention_layout import Layout, dim, vector
from xform.patterns.attention_logits import FLOATS, AddMask, Fill, Logits
from xform.rewrite.builder import Builder

MASK_INPUT = 3  # of the Attention operator


@dataclass
class _Numbers:
    """What a mask is made of.

    Attributes:
        lowest: Where the lowest number of the type stands: nodes and which of their inputs.
        known: Whether every other number is known to be either that high or that low that 5/8 tells nothing apart.
    """

    lowest: list[tuple[ir.Node, int]] = field(default_factory=list)
    known: bool = True


def lowest_fill(mask: ir.Value | None) -> tuple[ir.Node, int] | None:
    """A `Where(condition, a, lowest)` or `Mul(a, lowest)` above an additive mask, which may hold 5/8 of it as well.

    Returns:
        The node, and which of its inputs is the lowest number of the type.
    """
    if mask is None or mask.dtype not in FLOATS or mask.dtype is ir.DataType.FLOAT16:
        return None
    numbers = _numbers_of(mask)
    for node, index in numbers.lowest if numbers.known else ():
        readers = _attentions(node)
        masks = [reader.inputs[MASK_INPUT] for reader in readers or ()]
        if readers is not None and all(m is not None and _numbers_of(m).known for m in masks):
            return node, index
    return None


def _numbers_of(mask: ir.Value) -> _Numbers:
    found, stack, seen = _Numbers(), [mask], set[ir.Value]()
    assert mask.dtype is not None
    lowest, deep = float(ml_dtypes.finfo(mask.dtype.numpy()).min), deep_number(mask.dtype)  # type: ignore[no-untyped-call]
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in seen:
            continue
        seen.add(value)
        if constant_tensor(value) is not None:
            data = constant(value, max_elements=MAX_SCANNED)
            numbers = None if data is None else data.astype(np.float64)
            low = None if numbers is None else numbers[np.isfinite(numbers) & (numbers <= -DEEP)]
            found.known &= low is not None and bool(np.isclose(low, deep, rtol=1e-3).all())
            continue
        if node is None:
            found.known = False
        elif is_op(node, "Where", "Mul"):
            inputs = node.inputs[1:] if node.op_type == "Where" else node.inputs
            at = [i for i, v in enumerate(node.inputs) if v in inputs and v is not None and scalar(v) == lowest]
            found.lowest += [(node, i) for i in at]
            is_product = node.op_type == "Mul" and any(scalar(v) is not None for v in inputs)
            if not (is_product and (at or any(_close(scalar(v), deep) for v in inputs))):
                stack += [v for v in inputs if v is not None and scalar(v) != lowest]
                found.known &= node.op_type == "Where"
        elif is_op(node, *_MASK_OPS):
            stack += [v for v in (node.inputs if node.op_type == "Add" else node.inputs[:1]) if v is not None]
        else:
            found.known = False
    return found


def _close(number: object, to: float) -> bool:
    return isinstance(number, float) and math.isclose(number, to, rel_tol=1e-3)


_ROW_TESTS = ("ReduceMax", "Equal")  # of `Where(ReduceMax(bias) == -inf, NaN, bias)`
_MASK_OPS = ("Where", "Add", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice", "Identity")


def _attentions(node: ir.Node) -> list[ir.Node] | None:
    """The attentions whose masks are all that comes of `node`; None where something else does."""
    stack, seen, found = list(node.outputs), set[ir.Value](), list[ir.Node]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_output():
            return None
        for user, index in value.uses():
            if is_op(user, "Attention") and index == MASK_INPUT:
                found.append(user)
            elif is_op(user, *_MASK_OPS, *_ROW_TESTS) and not (
                user.op_type == "Where" and index == 0 and value.dtype in FLOATS
            ):
                stack += user.outputs
            else:
                return None
    return found


def build_mask(
    build: Builder,
    logits: Logits,
    layout: Layout,
    queries: ir.Value,
    keys: ir.Value,
    dtype: ir.DataType,
    guarded: bool,
) -> ir.Value | None:
    """The additive mask [batch or 1, heads or 1, S, T] of an attention; None where there is none.

    Args:
        queries: [B, H, S, D].
        keys: [B, H, T, D].
        dtype: Type of the logits.
        guarded: Whether a row without a key gives zeros, and not NaN.
    """
    bias: ir.Value | None = None
    for step in logits.steps:
        if isinstance(step, AddMask):
            mask = layout.lift_mask(build, step.mask, step.view, queries)
            mask = build.op("Neg", mask) if step.negative else mask
            bias = mask if bias is None else build.op("Add", bias, mask)
        elif isinstance(step, Fill):
            condition = layout.lift_mask(build, step.condition, step.view, queries)
            fill = build.constant(_number(step.fill, dtype))
            open_value = bias if bias is not None else build.constant(_number(0.0, dtype))
            pair = (open_value, fill) if step.keeps else (fill, open_value)
            bias = build.op("Where", condition, *pair)
        elif bias is not None:
            bias = build.op("Mul", bias, step.factor)
    if bias is None:
        return None
    full = spread(build, bias, queries, keys)
    if guarded or not may_close_rows(logits):
        return full
    largest = build.op("ReduceMax", full, [-1], keepdims=1)
    closed = build.op("Equal", largest, build.constant(_number(-math.inf, dtype)))
    return build.op("Where", closed, build.constant(_number(math.nan, dtype)), full)


def spread(build: Builder, mask: ir.Value, queries: ir.Value, keys: ir.Value) -> ir.Value:
    """`mask` with its last two axes at full length.

    The operator's definition lets them broadcast; ONNX Runtime's kernel does not.
    """
    shape = shape_of(mask)
    wanted = [dim(queries, 2), dim(keys, 2)]
    for at, length in enumerate((queries, keys)):  # a length that the mask has itself waits for nothing
        named = (shape_of(length) or (None,) * 4)[2]
        known = [axis for axis, size in enumerate(shape or ()) if same_dim(size, named)]
        if known and not isinstance(wanted[at], int):
            wanted[at] = (mask, known[-1])
    full = [(shape_of(v) or (None,) * 4)[2] for v in (queries, keys)]
    if shape is not None and None not in full and list(shape[-2:]) == full:
        return mask
    return build.op("Expand", mask, vector(build, [1, 1, *wanted]))


def _number(value: float, dtype: ir.DataType) -> Array:
    return np.asarray(value, dtype=dtype.numpy())

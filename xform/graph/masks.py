"""What is known about additive attention masks from how they are written.

A mask is read through the operators that only move its elements, through sums, selections and products by constants. A
number counts as *deep* where adding it to logits swallows them: `x + deep == deep` for every logit that a network has.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, constant, constant_tensor, is_op, scalar

MAX_SCANNED = 1 << 22  # elements of a constant mask that are looked at
DEEP = 1e30  # float32 and bfloat16 have steps of 7.6e22 and more there, so |x| < 3e22 is swallowed; float64 1e14
SMALL = 1e3  # below, adding a mask costs logits no more precision than their own size does
_FAR_FROM_LOWEST = 1e30  # half of the distance between the two lowest float32 is 1e31
MOVES = ("Expand", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Slice", "Gather", "Transpose", "Tile", "Identity")
_DEPTH = 24
_LOOKED_AT = 256  # values, each of which is looked at once


def is_deep(number: float, dtype: ir.DataType) -> bool:
    """Whether `x + number == number` in `dtype` for every logit x of ordinary size; float16 has no such number."""
    return math.isfinite(number) and number <= -DEEP and dtype is not ir.DataType.FLOAT16


def is_small(mask: ir.Value, limit: float = SMALL, depth: int = _DEPTH) -> bool:
    """Whether all numbers of a mask provably are between `-limit` and `limit`: constants, moved, selected or summed."""
    if constant_tensor(mask) is not None:
        data = constant(mask, max_elements=MAX_SCANNED)
        return data is not None and bool((np.abs(_floats(data)) <= limit).all())
    node = mask.producer()
    if node is None or depth == 0 or any(v is None for v in node.inputs[:1]):
        return False
    if is_op(node, *MOVES, "Cast"):
        return node.inputs[0] is not None and is_small(node.inputs[0], limit, depth - 1)
    if is_op(node, "Where"):
        return all(v is not None and is_small(v, limit, depth - 1) for v in node.inputs[1:3])
    if is_op(node, "Add", "Sub"):
        return all(v is not None and is_small(v, limit / 2, depth - 1) for v in node.inputs)
    return False


def coarse_number(mask: ir.Value, dtype: ir.DataType) -> float | None:
    """A constant in a mask that is neither small nor deep, such as the -10000 of `(1 - open) * -10000`.

    Added to logits it rounds them without swallowing them, so additions before and after it do not commute with it.
    """
    stack: list[ir.Value | None] = [mask]
    seen: set[ir.Value] = set()
    while stack and len(seen) < _LOOKED_AT:
        value = stack.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if constant_tensor(value) is not None:
            data = constant(value, max_elements=MAX_SCANNED)
            lowest = math.nan if data is None or not data.size else float(_finite_minimum(_floats(data)))
            if lowest < -SMALL and not is_deep(lowest, dtype):
                return lowest
            continue
        node = value.producer()
        if node is None:
            continue
        if is_op(node, "Where"):
            stack += node.inputs[1:3]
        elif is_op(node, "Mul", "Add", "Sub", "Div"):
            stack += node.inputs
        elif is_op(node, *MOVES, "Cast"):
            stack.append(node.inputs[0])
    return None


def is_switch(mask: ir.Value, dtype: ir.DataType, depth: int = _DEPTH) -> bool:
    """Whether a mask provably holds nothing but zeros, deep numbers and -inf."""
    if constant_tensor(mask) is not None:
        data = constant(mask, max_elements=MAX_SCANNED)
        if data is None or dtype is ir.DataType.FLOAT16:
            return False
        floats = _floats(data)
        return bool(((floats == 0) | (floats <= -DEEP)).all())
    node = mask.producer()
    if node is None or depth == 0:
        return False
    if is_op(node, "Where"):
        return all(v is not None and is_switch(v, dtype, depth - 1) for v in node.inputs[1:3])
    if is_op(node, "Mul"):
        numbers, flags = node.inputs[::-1], node.inputs
        return any(
            n is not None and f is not None and is_deep(float(scalar(n) or 0), dtype) and is_flags(f)
            for n, f in zip(numbers, flags, strict=True)
        )
    return is_op(node, *MOVES) and node.inputs[0] is not None and is_switch(node.inputs[0], dtype, depth - 1)


def never_minus_infinity(mask: ir.Value, depth: int = _DEPTH) -> bool:
    """Whether a float mask provably holds no -inf.

    Follows the spellings that exporters write, through any operators that only move elements: `Where(allowed, 0,
    lowest)`; `(1 - mask) * lowest` with a mask cast from integers or booleans; and a sum of such a mask and a constant
    bias, as in shifted windows.
    """
    if depth == 0:
        return False
    if constant_tensor(mask) is not None:
        data = constant(mask, max_elements=MAX_SCANNED)
        return data is not None and not bool(np.isneginf(_floats(data)).any())
    node = mask.producer()
    if node is None:
        return False
    if is_op(node, "Where"):
        return all(value is not None and never_minus_infinity(value, depth - 1) for value in node.inputs[1:3])
    if is_flags(mask):
        return True
    if is_op(node, "Cast", *MOVES):
        return node.inputs[0] is not None and never_minus_infinity(node.inputs[0], depth - 1)
    if is_op(node, "Concat", "Max", "Min"):
        return all(value is not None and never_minus_infinity(value, depth - 1) for value in node.inputs)
    near = {"Mul": 1.0, "Add": _far_from_lowest(mask.dtype), "Sub": _far_from_lowest(mask.dtype)}.get(
        node.op_type, -1.0
    )
    if any(value is not None and (is_small(value, near) or is_flags(value)) for value in node.inputs):
        return all(value is not None and never_minus_infinity(value, depth - 1) for value in node.inputs)
    return False


def is_flags(value: ir.Value, depth: int = _DEPTH) -> bool:
    """Whether a float value is made of flags: cast from booleans or integers (0 and 1 in a mask), or 1 minus such."""
    node = value.producer()
    if node is None or depth == 0 or not node.inputs or node.inputs[0] is None:
        return False
    if is_op(node, "Cast", "CastLike") and _is_integral(node.inputs[0]):
        return True
    if is_op(node, "Sub") and scalar(node.inputs[0]) == 1:
        return node.inputs[1] is not None and is_flags(node.inputs[1], depth - 1)
    return is_op(node, "Cast", *MOVES) and is_flags(node.inputs[0], depth - 1)


def _far_from_lowest(dtype: ir.DataType | None) -> float:
    """What may be added to the lowest number of a type without overflow: half of its distance to the next."""
    return 8.0 if dtype is ir.DataType.FLOAT16 else _FAR_FROM_LOWEST


def opens_every_row(mask: ir.Value) -> bool:
    """Whether every row of a constant mask, boolean or additive, leaves a key."""
    data = constant(mask, max_elements=MAX_SCANNED)
    if data is None or data.ndim == 0 or not data.shape[-1]:
        return False
    is_open = data if data.dtype.kind == "b" else ~np.isneginf(_floats(data))
    return bool(is_open.any(axis=-1).all())


def without_nan_rows(mask: ir.Value) -> ir.Value | None:
    """m of `Where(ReduceMax(m, -1) == -inf, NaN, m)`: a mask that gives NaN to a row without a key, as a softmax does.

    The largest number may also be taken of what m was expanded from.
    """
    node = mask.producer()
    if node is None or not is_op(node, "Where") or not _is_number(node.inputs[1], math.isnan):
        return None
    plain, test = node.inputs[2], node.inputs[0].producer() if node.inputs[0] is not None else None
    if plain is None or test is None or not is_op(test, "Equal") or not _is_number(test.inputs[1], math.isinf):
        return None
    reduced = test.inputs[0].producer() if test.inputs[0] is not None else None
    if reduced is None or not is_op(reduced, "ReduceMax") or reduced.inputs[0] is None or len(reduced.inputs) < 2:
        return None
    expanded = plain.producer()
    sources = [plain, expanded.inputs[0] if expanded is not None and is_op(expanded, "Expand") else plain]
    axes = constant(reduced.inputs[1], max_elements=1)
    last = axes is not None and axes.reshape(-1).tolist() == [-1] and reduced.attributes.get_int("keepdims", 1) == 1
    return plain if last and any(reduced.inputs[0] is source for source in sources) else None


def _is_number(value: ir.Value | None, test: object) -> bool:
    number = scalar(value)
    return isinstance(number, float) and callable(test) and bool(test(number))


def _is_integral(value: ir.Value | None) -> bool:
    return (
        value is not None and value.dtype is not None and (value.dtype.is_integer() or value.dtype is ir.DataType.BOOL)
    )


def _finite_minimum(data: Array) -> float:
    finite = data[np.isfinite(data)]
    return float(finite.min()) if finite.size else math.nan


def _floats(data: Array) -> Array:
    """As float64, in which every number of the smaller types is itself."""
    return data.astype(np.float64)

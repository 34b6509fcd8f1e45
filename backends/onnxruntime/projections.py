"""What queries, keys and values are made of: columns of linear layers on one input.

However the heads are split (one packed product or three; Split, Slice, Gather or unbind; reshape and transpose in any
order), every element q[b, h, s, d] is one column of a linear layer on row (b, s) of its input. Which one is found by
running the layout operators on an array of indices instead of numbers. With the columns known, the weights are permuted
offline and the layout operators vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, constant, is_op, shape_of

_LAYOUT = ("Transpose", "Reshape", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Identity")
_MAX_INDICES = 1 << 24  # elements of the index array, 4 bytes each; 8 images in Swin windows are 1 << 23
SWAP_HEADS = [0, 2, 1, 3]
_STAND_INS = (2, 5, 7, 11)  # numbers for symbolic dims


@dataclass(frozen=True)
class Projection:
    """[B, H, S, D] as columns of a linear layer.

    Attributes:
        source: Input of the layer, [B, S, C] or [B * S, C].
        weight: [C, H * D], the columns in the order of heads.
        bias: [H * D].
        nodes: The nodes that it takes the place of.
    """

    source: ir.Value
    weight: Array
    bias: Array
    nodes: tuple[ir.Node, ...]


def is_head_swap(node: ir.Node) -> bool:
    """Whether a node transposes [B, S, H, D] to [B, H, S, D], or back."""
    return is_op(node, "Transpose") and list(attribute(node, "perm", [])) == SWAP_HEADS


def read_projection(value: ir.Value) -> Projection | None:
    """`value` [B, H, S, D] as a projection; None if it is none, or its dims are unknown."""
    read = _read_columns(value, _read_linear)
    if read is None:
        return None
    found, order, nodes = read
    return replace(found, weight=found.weight[:, order], bias=found.bias[order], nodes=(*found.nodes, *nodes))


@dataclass(frozen=True)
class IntegerProjection:
    """[B, H, S, D] as columns of a product in integers, X W ~ (Xq - z) Wq (s t) + b.

    Attributes:
        source: Xq, uint8 [B, S, C] or [B * S, C].
        scale: s, float32 scalar.
        zero: z, uint8 scalar.
        codes: Wq, int8 [C, H * D], the columns in the order of heads.
        steps: t, float32 [H * D].
        bias: b, float32 [H * D].
        nodes: The nodes that it takes the place of.
    """

    source: ir.Value
    scale: ir.Value
    zero: ir.Value
    codes: Array
    steps: Array
    bias: Array
    nodes: tuple[ir.Node, ...]


def read_integer_projection(value: ir.Value) -> IntegerProjection | None:
    """`value` [B, H, S, D] as a projection in integers, as `quantize_products` writes it; None if it is none."""
    read = _read_columns(value, _read_integer_linear)
    if read is None:
        return None
    found, order, nodes = read
    codes, steps, bias = found.codes[:, order], found.steps[order], found.bias[order]
    return replace(found, codes=codes, steps=steps, bias=bias, nodes=(*found.nodes, *nodes))


def _read_columns(
    value: ir.Value, read_layer: Callable[[ir.Value], _Layer | None]
) -> tuple[_Layer, Array, tuple[ir.Node, ...]] | None:
    """The layer that layout operators make `value` of, the order of its columns, and these operators."""
    layer, chain = before_layout(value)
    found = None if layer is None else read_layer(layer)
    order = None if layer is None or found is None else order_of_columns(layer, chain, value)
    return None if found is None or order is None else (found, order, tuple(node for node, _ in chain))


_Layer = TypeVar("_Layer", Projection, IntegerProjection)
Chain = list[tuple[ir.Node, ir.Value]]  # layout operators from the first, each with its output


def before_layout(value: ir.Value) -> tuple[ir.Value | None, Chain]:
    """What layout operators make `value` of, and these."""
    chain: Chain = []
    at = value
    while (node := at.producer()) is not None and is_op(node, *_LAYOUT):
        chain.insert(0, (node, at))
        if node.inputs[0] is None:
            return None, chain
        at = node.inputs[0]
    return at, chain


def order_of_columns(layer: ir.Value, chain: Chain, value: ir.Value) -> Array | None:
    """Which column of `layer` each (head, element) of `value` [B, H, S, D] is, [H * D]; None if it is none."""
    shape, result = shape_of(layer), shape_of(value)
    if shape is None or result is None or len(result) != 4:
        return None
    sizes = _numbers(shape, result)
    if sizes is None:
        return None
    rows, columns = int(np.prod(sizes[0][:-1])), sizes[0][-1]
    indices: Array | None = np.arange(rows * columns, dtype=np.int32).reshape(sizes[0])
    for layout, output in chain:
        indices = None if indices is None else _apply(layout, output, indices)
    if indices is None or indices.shape != sizes[1]:
        return None
    batch, heads, tokens, size = sizes[1]
    expected = np.arange(batch * tokens).reshape(batch, 1, tokens, 1)
    if batch * tokens != rows or not np.array_equal(indices // columns, np.broadcast_to(expected, indices.shape)):
        return None
    picked = indices % columns
    order: Array = picked[0, :, 0, :].reshape(-1)
    return order if (picked == order.reshape(1, heads, 1, size)).all() else None


def _numbers(*shapes: tuple[int | str | None, ...]) -> list[tuple[int, ...]] | None:
    """The shapes with stand-ins for symbolic dims; None if a dim is unknown or there are too many."""
    names = list(dict.fromkeys(dim for shape in shapes for dim in shape if isinstance(dim, str)))
    if len(names) > len(_STAND_INS) or any(dim is None for shape in shapes for dim in shape):
        return None
    known: Mapping[object, int] = dict(zip(names, _STAND_INS, strict=False))
    numbers = [tuple(known.get(dim, dim) for dim in shape) for shape in shapes]
    sizes = [tuple(int(dim) for dim in shape if isinstance(dim, int)) for shape in numbers]
    return sizes if all(np.prod(shape) <= _MAX_INDICES for shape in sizes) else None


def _read_linear(value: ir.Value) -> Projection | None:
    """MatMul(X, W) with an optional Add(_, b): X, W [C, N], b [N] and the nodes."""
    product, bias, outer = _without_bias(value)
    node = product.producer()
    weight = constant(node.inputs[1]) if node is not None and is_op(node, "MatMul") else None
    if node is None or weight is None or weight.ndim != 2 or node.inputs[0] is None:
        return None
    bias = np.zeros(weight.shape[1], weight.dtype) if bias is None else bias
    if not bias.size == weight.shape[1] == bias.shape[-1]:
        return None
    return Projection(node.inputs[0], weight, bias.reshape(-1), (*outer, node))


def _without_bias(value: ir.Value) -> tuple[ir.Value, Array | None, tuple[ir.Node, ...]]:
    """What a constant is added to, the constant and the Add; or `value` itself."""
    node = value.producer()
    if node is not None and is_op(node, "Add"):
        for product, bias in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            array = constant(bias)
            if product is not None and array is not None and array.ndim:
                return product, array, (node,)
    return value, None, ()


def _read_integer_linear(value: ir.Value) -> IntegerProjection | None:
    """Add(Mul(Cast(MatMulInteger(Xq, Wq, z)), Mul(s, t)), b), the Add left out where there is no bias."""
    product, bias, outer = _without_bias(value)
    scaled = product.producer()
    if scaled is None or not is_op(scaled, "Mul"):
        return None
    cast, factor = (None if v is None else v.producer() for v in scaled.inputs)
    if cast is None or not is_op(cast, "Cast") or cast.inputs[0] is None or factor is None or not is_op(factor, "Mul"):
        return None
    sums = cast.inputs[0].producer()
    if sums is None or not is_op(sums, "MatMulInteger") or len(sums.inputs) != 3:  # a fourth is a zero of the weight
        return None
    source, zero, scale = sums.inputs[0], sums.inputs[2], factor.inputs[0]
    codes, steps = constant(sums.inputs[1]), constant(factor.inputs[1])
    if codes is None or codes.dtype != np.int8 or codes.ndim != 2 or steps is None or steps.shape != codes.shape[1:]:
        return None
    if source is None or source.dtype is not ir.DataType.UINT8 or scale is None or zero is None or shape_of(scale):
        return None
    bias = np.zeros(steps.shape, np.float32) if bias is None else bias
    if bias.size != steps.size or bias.shape[-1:] != steps.shape:
        return None
    return IntegerProjection(source, scale, zero, codes, steps, bias.reshape(-1), (*outer, scaled, cast, factor, sums))


def _apply(node: ir.Node, output: ir.Value, x: Array) -> Array | None:
    """A layout operator on an array; None where its parameters are no constants."""
    parameters = [None if v is None else constant(v) for v in node.inputs[1:]]
    if any(p is None and v is not None for p, v in zip(parameters, node.inputs[1:], strict=True)):
        return None
    return _OPERATORS[node.op_type](node, output, x, [p for p in parameters if p is not None])


def _transpose(node: ir.Node, output: ir.Value, x: Array, given: list[Array]) -> Array | None:
    return x.transpose(attribute(node, "perm"))


def _reshape(node: ir.Node, output: ir.Value, x: Array, given: list[Array]) -> Array | None:
    target = [int(n) for n in given[0]]
    if not attribute(node, "allowzero", 0):
        if len(target) > x.ndim and 0 in target[x.ndim :]:
            return None
        target = [x.shape[i] if n == 0 else n for i, n in enumerate(target)]
    known = int(np.prod([n for n in target if n > 0]))
    if target.count(-1) > 1 or x.size % max(known, 1) or (-1 not in target and known != x.size):
        return None
    return x.reshape(target)


def _split(node: ir.Node, output: ir.Value, x: Array, given: list[Array]) -> Array | None:
    axis = attribute(node, "axis", 0)
    if given:
        ends = np.cumsum(given[0])
        if ends[-1] != x.shape[axis]:
            return None
        parts = np.split(x, ends[:-1], axis)
    elif x.shape[axis] % len(node.outputs):
        return None
    else:
        parts = np.split(x, len(node.outputs), axis)
    return parts[[o is output for o in node.outputs].index(True)]


def _slice(node: ir.Node, output: ir.Value, x: Array, given: list[Array]) -> Array | None:
    starts, ends = given[0].reshape(-1), given[1].reshape(-1)
    axes = given[2].reshape(-1) if len(given) > 2 else np.arange(len(starts))
    steps = given[3].reshape(-1) if len(given) > 3 else np.ones(len(starts), np.int64)
    if (steps <= 0).any() or (node.inputs[3:4] and node.inputs[3] is None):
        return None
    where: list[slice] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        where[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(where)]


def _gather(node: ir.Node, output: ir.Value, x: Array, given: list[Array]) -> Array | None:
    axis = attribute(node, "axis", 0)
    inside = bool(((given[0] >= -x.shape[axis]) & (given[0] < x.shape[axis])).all())
    return np.take(x, given[0], axis) if inside else None


def _squeeze(node: ir.Node, output: ir.Value, x: Array, given: list[Array]) -> Array | None:
    axes = tuple(int(a) for a in given[0].reshape(-1)) if given else tuple(i for i, n in enumerate(x.shape) if n == 1)
    return x.squeeze(axes) if all(x.shape[a] == 1 for a in axes) else None


def _unsqueeze(node: ir.Node, output: ir.Value, x: Array, given: list[Array]) -> Array | None:
    return np.expand_dims(x, tuple(int(a) for a in given[0].reshape(-1)))


def _identity(node: ir.Node, output: ir.Value, x: Array, given: list[Array]) -> Array | None:
    return x


_OPERATORS: Mapping[str, Callable[[ir.Node, ir.Value, Array, list[Array]], Array | None]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Identity": _identity,
}

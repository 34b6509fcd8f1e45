"""What queries, keys and values are made of: columns of linear layers on one input.

However the heads are split (one packed product or three; Split, Slice, Gather or unbind; reshape and transpose in any
order), every element q[b, h, s, d] is one column of a linear layer on row (b, s) of its input. Which one is found by
running the layout operators on an array of indices instead of numbers. With the columns known, the weights are permuted
offline and the layout operators vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, constant, is_op, shape_of

_LAYOUT = ("Transpose", "Reshape", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Identity")
_MAX_INDICES = 1 << 24  # elements of the index array, 4 bytes each; 8 images in Swin windows are 1 << 23
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


def read_projection(value: ir.Value) -> Projection | None:
    """`value` [B, H, S, D] as a projection; None if it is none, or its dims are unknown."""
    chain: list[tuple[ir.Node, ir.Value]] = []
    at = value
    while (node := at.producer()) is not None and is_op(node, *_LAYOUT):
        chain.insert(0, (node, at))
        if node.inputs[0] is None:
            return None
        at = node.inputs[0]
    linear = _read_linear(at)
    shape, result = shape_of(at), shape_of(value)
    if linear is None or shape is None or result is None or len(result) != 4:
        return None
    source, weight, bias, nodes = linear
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
    order = picked[0, :, 0, :].reshape(-1)
    if not (picked == order.reshape(1, heads, 1, size)).all():
        return None
    return Projection(source, weight[:, order], bias[order], (*nodes, *(n for n, _ in chain)))


def _numbers(*shapes: tuple[int | str | None, ...]) -> list[tuple[int, ...]] | None:
    """The shapes with stand-ins for symbolic dims; None if a dim is unknown or there are too many."""
    names = list(dict.fromkeys(dim for shape in shapes for dim in shape if isinstance(dim, str)))
    if len(names) > len(_STAND_INS) or any(dim is None for shape in shapes for dim in shape):
        return None
    known: Mapping[object, int] = dict(zip(names, _STAND_INS, strict=False))
    numbers = [tuple(known.get(dim, dim) for dim in shape) for shape in shapes]
    sizes = [tuple(int(dim) for dim in shape if isinstance(dim, int)) for shape in numbers]
    return sizes if all(np.prod(shape) <= _MAX_INDICES for shape in sizes) else None


def _read_linear(value: ir.Value) -> tuple[ir.Value, Array, Array, tuple[ir.Node, ...]] | None:
    """MatMul(X, W) with an optional Add(_, b): X, W [C, N], b [N] and the nodes."""
    node = value.producer()
    if node is None:
        return None
    if is_op(node, "Add"):
        for product, bias in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            offsets, inner = constant(bias), None if product is None else product.producer()
            if offsets is not None and inner is not None and is_op(inner, "MatMul"):
                found = _read_linear(inner.outputs[0])
                if found is not None and offsets.size == found[1].shape[1] == offsets.shape[-1]:
                    return found[0], found[1], offsets.reshape(-1), (node, *found[3])
        return None
    if not is_op(node, "MatMul") or node.inputs[0] is None:
        return None
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    return node.inputs[0], weight, np.zeros(weight.shape[1], weight.dtype), (node,)


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

"""Range analysis: how large the numbers in a graph can get, from its weights alone.

One sweep in graph order gives every value an upper bound of its magnitude, in real arithmetic. Graph inputs of
floating-point type have none unless one is given, and what is not understood has none either, so a finite bound is a
proof and an infinite one says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from xform.graph.channel_axis import linear_axis
from xform.graph.values import ONNX_DOMAINS, attribute, constant, is_constant, is_op, scalar, shape_of

Bounds = dict[ir.Value, float]
UNKNOWN = math.inf

_SAME = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather", "GatherElements", "GatherND", "Split",
    "Expand", "Tile", "Identity", "Cast", "Neg", "Abs", "Relu", "Gelu", "HardSwish", "Swish", "ReduceMean", "ReduceMax",
    "ReduceMin", "GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
_UNIT = ("Softmax", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Sin", "Cos", "Softsign", "Sign")


def bounds(graph: ir.Graph, inputs: float = UNKNOWN) -> Bounds:
    """Upper bounds of the magnitude of every value of `graph`, its subgraphs left out.

    Args:
        graph: In topological order.
        inputs: A bound for the graph's floating-point inputs.
    """
    found: Bounds = {
        v: inputs if v.dtype is not None and v.dtype.is_floating_point() else UNKNOWN for v in graph.inputs
    }
    for node in graph:
        operands = [_operand(value, found) for value in node.inputs]
        bound = _node(node, operands) if node.domain in ONNX_DOMAINS else UNKNOWN
        for index, output in enumerate(node.outputs):
            described = index == 0 or is_op(node, "Split")
            found[output] = bound if described and not math.isnan(bound) else UNKNOWN
    return found


def _operand(value: ir.Value | None, found: Bounds) -> float:
    if value is None:
        return 0.0
    if value in found:
        return found[value]
    array = constant(value)
    if array is None or not array.size or array.dtype.kind in "OSU":
        return UNKNOWN
    found[value] = float(np.abs(array.astype(np.float64)).max())
    return found[value]


def _node(node: ir.Node, operands: Sequence[float]) -> float:
    if node.op_type in _UNIT:
        return 1.0
    if node.op_type in _SAME:
        return operands[0]
    if linear_axis(node) is not None:
        return _linear(node, operands)
    rule = _RULES.get(node.op_type)
    return UNKNOWN if rule is None else rule(node, operands)


def _linear(node: ir.Node, operands: Sequence[float]) -> float:
    """|W x + b| <= max|x| * (largest sum of |W| for one output) + max|b|."""
    weight = constant(node.inputs[1])
    assert weight is not None
    size = np.abs(weight.astype(np.float64))
    if is_op(node, "Conv"):
        row = float(size.reshape(size.shape[0], -1).sum(axis=1).max())
    elif is_op(node, "ConvTranspose"):
        row = float(size.sum())  # taps overlap; a coarse bound is a bound
    else:
        row = float(size.sum(axis=1 if is_op(node, "Gemm") and attribute(node, "transB", 0) else 0).max())
    factor = abs(float(attribute(node, "alpha", 1.0))) if is_op(node, "Gemm") else 1.0
    bias = operands[2] if len(operands) > 2 else 0.0
    return _product(operands[0], row * factor) + bias * abs(float(attribute(node, "beta", 1.0)))


def _norm(node: ir.Node, operands: Sequence[float]) -> float:
    """|n_i| <= sqrt(d), since the squares of d numbers sum to d at most."""
    shape = shape_of(node.inputs[0])
    axis = int(attribute(node, "axis", -1))
    sizes = None if shape is None else shape[axis % len(shape) :]
    if sizes is None or any(not isinstance(size, int) for size in sizes):
        return UNKNOWN
    count = math.prod(size for size in sizes if isinstance(size, int))
    return _product(math.sqrt(count), operands[1]) + (operands[2] if len(operands) > 2 else 0.0)


def _matmul(node: ir.Node, operands: Sequence[float]) -> float:
    shape = shape_of(node.inputs[0])
    inner = shape[-1] if shape else None
    return _product(operands[0], operands[1]) * inner if isinstance(inner, int) else UNKNOWN


def _division(node: ir.Node, operands: Sequence[float]) -> float:
    array = constant(node.inputs[1]) if is_constant(node.inputs[1]) else None
    smallest = float(np.abs(array.astype(np.float64)).min()) if array is not None and array.size else 0.0
    return operands[0] / smallest if smallest else UNKNOWN


def _clip(node: ir.Node, operands: Sequence[float]) -> float:
    limits = [scalar(value) for value in node.inputs[1:3]]
    if len(limits) == 2 and None not in limits:
        return max(abs(float(limit)) for limit in limits if limit is not None)
    return operands[0]


def _sum(node: ir.Node, operands: Sequence[float]) -> float:
    return sum(operands)


def _mul(node: ir.Node, operands: Sequence[float]) -> float:
    return _product(operands[0], operands[1])


def _product(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _largest(node: ir.Node, operands: Sequence[float]) -> float:
    return max(operands)


_RULES: dict[str, Callable[[ir.Node, Sequence[float]], float]] = {
    "Add": _sum,
    "Sub": _sum,
    "Sum": _sum,
    "Mul": _mul,
    "Div": _division,
    "MatMul": _matmul,
    "Concat": _largest,
    "Max": _largest,
    "Min": _largest,
    "Where": lambda node, operands: max(operands[1:]),
    "Attention": lambda node, operands: operands[2] if len(operands) < 6 or not operands[5] else UNKNOWN,
    "Clip": _clip,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
}

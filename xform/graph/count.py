"""Floating-point operations, bytes moved and parameters, per node and in total.

A multiply-add counts as two operations. Formulas, with N(.) the number of elements and y the output:

    MatMul, MatMulInteger, QLinearMatMul     2 N(y) K
    Gemm                                     2 N(y) K, + N(y) with C
    Conv, ConvInteger, QLinearConv           2 N(y) Cin/groups prod(kernel), + N(y) with a bias
    ConvTranspose                            2 N(x) Cout/groups prod(kernel), + N(y) with a bias
    Attention                                2 B H S T (D + Dv) + 5 B H S T (scale and softmax)
    Einsum                                   2 x product of the sizes of all labels
    RNN, GRU, LSTM                           directions x S B x gates H (2 (I + H) + 3), gates = 1, 3, 4
    LayerNormalization and its kin           7 N(x);  RMSNormalization 4 N(x);  BatchNormalization 2 N(x)
    Softmax, LogSoftmax                      5 N(x)
    pooling                                  prod(kernel) N(y);  global pooling and reductions N(x)
    elementwise arithmetic                   N(y);  one that needs exp, erf, a root or the like 4 N(y)
    moving data, casts, comparisons, shapes  0

Bytes are what the node reads and writes, each tensor once; views (Reshape and the like) move nothing. Bodies of If,
Loop and Scan count once. Symbolic dims take the value of `bindings`, else 1, and `ModelCounts.assumed` names those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph import dims
from xform.graph.values import ONNX_DOMAINS, attribute, constant_tensor, display_name, shape_of

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class NodeCounts:
    """Counts of one node.

    Attributes:
        name: Original name of the node.
        op_type: Operator, with its domain unless it is a standard one.
        flops: Operations; None where a shape or the operator is unknown.
        bytes: Bytes read and written; unknown shapes count nothing.
        parameters: Elements of the constants it reads.
    """

    name: str
    op_type: str
    flops: int | None
    bytes: int
    parameters: int


@dataclass(frozen=True)
class ModelCounts:
    """Counts of a model.

    Attributes:
        nodes: Per node, in graph order.
        flops: Sum over nodes whose operations are known.
        bytes: Sum over nodes.
        parameters: Elements of all initializers, shared ones once.
        parameter_bytes: Their size.
        assumed: Symbolic dims that counted as 1 for want of a binding.
        unknown: Names of nodes whose operations are unknown.
    """

    nodes: tuple[NodeCounts, ...]
    flops: int
    bytes: int
    parameters: int
    parameter_bytes: int
    assumed: tuple[str, ...]
    unknown: tuple[str, ...]


def count(model: ir.Model, bindings: Mapping[str, int] | None = None) -> ModelCounts:
    """Count `model`.

    Args:
        bindings: Values of symbolic dims by name; others count as 1.
    """
    counter = _Counter(bindings or {})
    nodes = tuple(counter.node(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))
    tensors = [v.const_value for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]
    return ModelCounts(
        nodes,
        sum(n.flops or 0 for n in nodes),
        sum(n.bytes for n in nodes),
        sum(t.size for t in tensors),
        sum(t.nbytes for t in tensors),
        tuple(sorted(counter.assumed)),
        tuple(n.name for n in nodes if n.flops is None),
    )


def count_node(node: ir.Node, bindings: Mapping[str, int] | None = None) -> NodeCounts:
    """Counts of one node."""
    return _Counter(bindings or {}).node(node)


def bindings_of(model: ir.Model, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Values of the symbolic dims that `inputs` (arrays by name; not all need be there) have."""
    given = ((shape_of(value) or (), inputs.get(value.name or "")) for value in model.graph.inputs)
    return {
        dim: size
        for shape, array in given
        if array is not None
        for dim, size in zip(shape, np.shape(array), strict=False)
        if isinstance(dim, str)
    }


class _Counter:
    def __init__(self, bindings: Mapping[str, int]) -> None:
        self.bindings = bindings
        self.assumed: set[str] = set()

    def node(self, node: ir.Node) -> NodeCounts:
        distinct = {v for v in node.inputs if v is not None}
        parameters = sum(t.size for v in distinct if (t := constant_tensor(v)) is not None)
        kind = f"{node.domain}.{node.op_type}" if node.domain not in ONNX_DOMAINS else node.op_type
        return NodeCounts(display_name(node), kind, self._flops(node), self._bytes(node, distinct), parameters)

    def sizes(self, value: ir.Value | None) -> Sizes:
        """The dims of `value` as numbers.

        Raises:
            _UnknownShapeError: A dim or the rank is unknown.
        """
        shape = shape_of(value)
        if shape is None or any(d is None for d in shape):
            raise _UnknownShapeError
        return tuple(d if isinstance(d, int) else self._evaluate(d) for d in shape if d is not None)

    def _evaluate(self, name: str) -> int:
        if name in self.bindings:
            return self.bindings[name]
        expression = dims.parse(name)
        self.assumed.update(s for s in dims.symbols(expression) if s not in self.bindings)
        return max(dims.evaluate(expression, self.bindings), 0)

    def _flops(self, node: ir.Node) -> int | None:
        if node.domain not in ONNX_DOMAINS:
            return None
        rule = _RULES.get(node.op_type)
        try:
            return rule(node, self) if rule is not None else (0 if node.op_type in _FREE else None)
        except (_UnknownShapeError, IndexError, ValueError, TypeError, ZeroDivisionError):
            return None  # unknown, or inputs that do not fit the operator, so that there is nothing to count

    def _bytes(self, node: ir.Node, inputs: set[ir.Value]) -> int:
        if node.op_type in _VIEWS and node.domain in ONNX_DOMAINS:
            return 0
        total = 0
        for value in (*inputs, *node.outputs):
            if value.dtype is None or value.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
                continue
            try:
                total += math.ceil(math.prod(self.sizes(value)) * value.dtype.bitwidth / 8)
            except _UnknownShapeError:
                continue
        return total


class _UnknownShapeError(Exception):
    pass


_Rule = Callable[[ir.Node, _Counter], int]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _matmul(node: ir.Node, c: _Counter) -> int:
    return 2 * math.prod(c.sizes(node.outputs[0])) * c.sizes(node.inputs[0])[-1]


def _gemm(node: ir.Node, c: _Counter) -> int:
    outputs = math.prod(c.sizes(node.outputs[0]))
    depth = c.sizes(node.inputs[0])[0 if attribute(node, "transA", 0) else 1]
    return 2 * outputs * depth + (outputs if _input(node, 2) is not None else 0)


def _conv(weight: int, bias: int) -> _Rule:
    def rule(node: ir.Node, c: _Counter) -> int:
        outputs = math.prod(c.sizes(node.outputs[0]))
        return 2 * outputs * math.prod(c.sizes(node.inputs[weight])[1:]) + (outputs if _input(node, bias) else 0)

    return rule


def _conv_transpose(node: ir.Node, c: _Counter) -> int:
    products = 2 * math.prod(c.sizes(node.inputs[0])) * math.prod(c.sizes(node.inputs[1])[1:])
    return products + (math.prod(c.sizes(node.outputs[0])) if _input(node, 2) is not None else 0)


def _attention(node: ir.Node, c: _Counter) -> int:
    query, key, value = (c.sizes(v) for v in node.inputs[:3])
    if len(query) == 4:
        batch, heads, length, width = query
        total, value_width = key[2], value[3]
    else:
        batch, length = query[:2]
        heads, kv_heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
        width, value_width, total = query[2] // heads, value[2] // kv_heads, key[1]
    if (past := _input(node, 4)) is not None:
        total += c.sizes(past)[2]
    return int(batch * heads * length * total * (2 * (width + value_width) + 5))


def _einsum(node: ir.Node, c: _Counter) -> int:
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    if "." in equation:
        raise _UnknownShapeError
    labels: dict[str, int] = {}
    for term, value in zip(equation.split("->")[0].split(","), node.inputs, strict=True):
        labels.update(zip(term, c.sizes(value), strict=True))
    return 2 * math.prod(labels.values())


def _recurrent(gates: int) -> _Rule:
    def rule(node: ir.Node, c: _Counter) -> int:
        x = c.sizes(node.inputs[0])
        directions, rows, width = c.sizes(node.inputs[1])
        hidden = rows // gates
        return directions * x[0] * x[1] * gates * hidden * (2 * (width + hidden) + 3)

    return rule


def _per_input(factor: int) -> _Rule:
    return lambda node, c: factor * math.prod(c.sizes(node.inputs[0]))


def _per_output(factor: int) -> _Rule:
    return lambda node, c: factor * math.prod(c.sizes(node.outputs[0]))


def _variadic(node: ir.Node, c: _Counter) -> int:
    return (len(node.inputs) - 1) * math.prod(c.sizes(node.outputs[0]))


def _pool(node: ir.Node, c: _Counter) -> int:
    kernel: Sequence[int] = attribute(node, "kernel_shape", [1])
    return math.prod(c.sizes(node.outputs[0])) * math.prod(kernel)


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _table(rule: _Rule, names: str) -> dict[str, _Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, _Rule] = {
    **_table(_matmul, "MatMul MatMulInteger QLinearMatMul"),
    "Gemm": _gemm,
    **_table(_conv(weight=1, bias=2), "Conv ConvInteger DeformConv"),
    "QLinearConv": _conv(weight=3, bias=8),
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "Einsum": _einsum,
    "RNN": _recurrent(1),
    "GRU": _recurrent(3),
    "LSTM": _recurrent(4),
    **_table(_per_input(7), "LayerNormalization GroupNormalization InstanceNormalization MeanVarianceNormalization"),
    **_table(_per_input(4), "RMSNormalization LpNormalization LRN"),
    **_table(_per_input(2), "BatchNormalization"),
    **_table(_per_input(5), "Softmax LogSoftmax"),
    **_table(_pool, "AveragePool MaxPool LpPool"),
    **_table(
        _per_input(1),
        "GlobalAveragePool GlobalMaxPool GlobalLpPool ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 "
        "ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp CumSum ArgMax ArgMin",
    ),
    **_table(
        _per_output(1),
        "Add Sub Mul Div Neg Abs Relu LeakyRelu PRelu Clip HardSigmoid HardSwish ThresholdedRelu Sign Floor Ceil Round "
        "Reciprocal Mod QuantizeLinear DequantizeLinear DynamicQuantizeLinear Resize",
    ),
    **_table(_variadic, "Sum Mean Max Min"),
    **_table(
        _per_output(4),
        "Exp Log Sqrt Pow Erf Sigmoid Tanh Gelu Swish Mish Elu Celu Selu Softplus Softsign Sin Cos Tan Asin Acos Atan "
        "Sinh Cosh Asinh Acosh Atanh",
    ),
    "RotaryEmbedding": _per_output(3),
}

_VIEWS = _names("Reshape Squeeze Unsqueeze Flatten Identity")
_FREE = _VIEWS | _names(
    "And Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Compress Concat Constant "
    "ConcatFromSequence ConstantOfShape DepthToSpace Dropout Equal Expand EyeLike Gather GatherElements GatherND "
    "Greater GreaterOrEqual If IsInf IsNaN Less LessOrEqual Loop Multinomial NonZero Not OneHot Optional "
    "OptionalGetElement OptionalHasElement Or Pad RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range "
    "ReverseSequence Scan Scatter ScatterElements ScatterND SequenceAt SequenceConstruct SequenceEmpty SequenceInsert "
    "SequenceLength Shape Size Slice SpaceToDepth Split SplitToSequence TensorScatter Tile TopK Transpose Trilu "
    "Unique Where Xor"
)

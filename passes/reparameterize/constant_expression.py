"""Weights that are computed from other weights: constant sub-graphs, evaluated in float64 and only when asked for.

Adapters leave such sub-graphs behind: LoHa multiplies two low-rank products, LoKr forms a Kronecker product, DoRA
divides a magnitude by the norm of the updated weight. They are as large as the weights themselves, so general constant
folding leaves them alone; a merge that puts the result into one weight anyway needs it once, and in full precision.

Evaluated by onnx's reference implementation, with every floating-point constant and cast widened to float64.
Operators on quantized or random data are no constants here.
"""

from __future__ import annotations

import weakref

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from xform.graph.values import ONNX_DOMAINS, Array, constant, constant_tensor, is_constant

_OPERATORS = frozenset(
    "Abs Add Cast CastLike Concat Div Einsum Equal Exp Expand EyeLike Flatten Gather Gemm Identity Log MatMul Mul "  # noqa: SIM905
    "Neg Pow Range Reciprocal ReduceL1 ReduceL2 ReduceMean ReduceSum ReduceSumSquare Reshape Shape Slice Sqrt Squeeze "
    "Sub Sum Tile Transpose Unsqueeze Where".split()
)
_MAX_NODES = 64
_KEPT = 1 << 16  # elements; larger results are computed anew, so that none of them outlives its merge

_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
}

_results: weakref.WeakKeyDictionary[ir.Value, Array] = weakref.WeakKeyDictionary()


def expression(value: ir.Value | None) -> list[ir.Node] | None:
    """The nodes that compute `value` from constants alone, in order; empty for a constant, None if it is neither."""
    if value is None:
        return None
    order: dict[ir.Node, None] = {}
    if not _collect(value, order):
        return None
    return list(order)


def _collect(value: ir.Value, order: dict[ir.Node, None]) -> bool:
    if is_constant(value):
        return True
    node = value.producer()
    if node is None or value.is_graph_output():
        return False
    if node in order:
        return True
    if node.op_type not in _OPERATORS or node.domain not in ONNX_DOMAINS or len(node.outputs) != 1:
        return False
    inputs = [v for v in node.inputs if v is not None]
    if not inputs or len(order) >= _MAX_NODES or not all(_collect(v, order) for v in inputs):
        return False
    order[node] = None
    return True


def evaluate(value: ir.Value | None) -> Array | None:
    """The data of a constant (as it stands) or of a constant expression (floats in float64); None if it is neither."""
    if value is None:
        return None
    known = constant(value)
    if known is not None:
        return known
    if value in _results:
        return _results[value]
    nodes = expression(value)
    if nodes is None:
        return None
    result = _run(value, nodes)
    if result.size <= _KEPT:
        _results[value] = result
    return result


def _run(value: ir.Value, nodes: list[ir.Node]) -> Array:
    feeds: dict[str, Array] = {}
    protos = []
    for node in nodes:
        proto = ir.to_proto(node)
        for attr in proto.attribute:
            if node.op_type in ("Cast", "EyeLike") and attr.name in ("to", "dtype") and attr.i in _FLOATS:
                attr.i = onnx.TensorProto.DOUBLE
        protos.append(proto)
        for source in node.inputs:
            tensor = constant_tensor(source)
            if source is not None and tensor is not None and source.name is not None:
                array = tensor.numpy()
                wide = array.dtype.kind == "f" or tensor.dtype == ir.DataType.BFLOAT16
                feeds[source.name] = array.astype(np.float64) if wide else array
    graph = onnx.helper.make_graph(
        protos,
        "constant",
        [_declared(name, array) for name, array in feeds.items()],
        [onnx.helper.make_value_info(value.name or "", onnx.TypeProto())],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    with np.errstate(all="ignore"):  # ONNX has no warnings: the logarithm of 0 is -inf, which a Where may leave out
        result: Array = np.asarray(next(iter(ReferenceEvaluator(model).run(None, feeds))))
    return result


def _declared(name: str, array: Array) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

"""MatMul and Add back to Gemm, where the input is a matrix.

ONNX Runtime makes this fusion itself at load; written out, it also serves runtimes that do not. For higher ranks MatMul
and Add take the time of one Gemm (docs/onnxruntime-notes.md), so they stay.
"""

from __future__ import annotations

import onnx_ir as ir

from xform.backends.onnxruntime.emit import Emitter
from xform.graph.values import is_constant, is_op, rank_of, shape_of, used_once

_GEMM_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


def lower_linear(emitter: Emitter, node: ir.Node) -> bool:
    """`Add(MatMul(X [M, K], W [K, N]), b [N])` with constant W and b to `Gemm(X, W, b)`; `node` is the Add."""
    for product, bias in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        matmul = None if product is None else product.producer()
        if product is None or bias is None or matmul is None or not is_op(matmul, "MatMul"):
            continue
        x, weight = matmul.inputs
        if matmul.graph is not node.graph or not used_once(product) or not _fits(x, weight, bias):
            continue
        site = emitter.at(node)
        result = site.op("Gemm", x, weight, bias)
        site.replace([(node.outputs[0], result)], "linear: Gemm")
        site.graph.remove(matmul, safe=True)
        return True
    return False


def _fits(x: ir.Value | None, weight: ir.Value | None, bias: ir.Value) -> bool:
    if rank_of(x) != 2 or rank_of(weight) != 2 or not is_constant(weight) or not is_constant(bias):
        return False
    weight_shape, bias_shape = shape_of(weight), shape_of(bias)
    assert weight_shape is not None and weight is not None
    broadcasts = bias_shape in ((weight_shape[1],), (1, weight_shape[1]))
    return broadcasts and weight.dtype in _GEMM_DTYPES

"""Which operators ONNX Runtime can run on the CPU for which dtype, and runs in the precision of that dtype.

The standard says which dtypes an operator may have; a runtime implements a part of them. A rewrite from five operators
that run in float64 to one that does not is wrong however right its algebra is. The table holds what was measured with
ONNX Runtime 1.31.1 at opset 23: every operator that passes write, and the usual ones that they replace. An operator
without a row counts as one that runs. float16 runs everywhere, since the runtime puts Casts around what it has no
kernel for. `tests/graph/test_kernels.py` asks the runtime for each entry, by loading a model of one node.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from xform.graph.values import ONNX_DOMAINS

_DTYPES = {
    "f": ir.DataType.FLOAT,
    "d": ir.DataType.DOUBLE,
    "h": ir.DataType.FLOAT16,
    "b": ir.DataType.BFLOAT16,
    "1": ir.DataType.INT8,
    "2": ir.DataType.INT16,
    "4": ir.DataType.INT32,
    "8": ir.DataType.INT64,
    "A": ir.DataType.UINT8,
    "B": ir.DataType.UINT16,
    "C": ir.DataType.UINT32,
    "D": ir.DataType.UINT64,
    "?": ir.DataType.BOOL,
}

# fmt: off
_ROWS = {
    # every dtype of the standard
    "fdhb1248ABCD?": ("Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split",
                      "Squeeze", "Transpose", "Unsqueeze"),
    "fdhb1248ABCD": ("Clip", "Sign"),
    # every one but bfloat16
    "fdh1248ABCD?": ("Equal", "Expand", "Tile", "Size"),
    "fdh1248ABCD": ("Add", "Sub", "Mul", "Div", "Abs", "Less"),
    "fdh1248": ("Neg",),
    "fdh48": ("Pow", "ReduceMean", "ReduceSum", "Einsum"),
    "fdh": ("BatchNormalization", "Ceil", "Exp", "Floor", "Gemm", "Log", "LogSoftmax", "LpNormalization",
            "RMSNormalization", "Reciprocal", "Round", "Sigmoid", "Softmax", "Sqrt", "Sum", "Swish", "Tanh"),
    "fdhb": ("LayerNormalization",),
    # with gaps among integers
    "fdh148ACD?": ("Pad",),
    "fdh148ACD": ("Max", "Min"),
    "fdh148A?": ("ReduceMax",),
    "fdh14": ("Relu",),
    "fdh148AC": ("Where",),
    "fdh48CD": ("MatMul",),
    "fdh1A": ("MaxPool",),
    # not in float64. Attention loads, but computes its scale in float32
    "fh": ("Attention", "AveragePool", "Conv", "ConvTranspose", "Elu", "Erf", "Gelu", "GlobalAveragePool",
           "HardSigmoid", "HardSwish", "InstanceNormalization", "LeakyRelu", "Mean", "Mish", "PRelu", "RotaryEmbedding",
           "Softplus"),
}
# fmt: on

KERNELS: Mapping[str, frozenset[ir.DataType]] = {
    op_type: frozenset(_DTYPES[code] for code in codes) for codes, op_types in _ROWS.items() for op_type in op_types
}


def computing_type(node: ir.Node) -> ir.DataType | None:
    """The dtype that a node computes in: that of its first input, of Where its second; None where it is unknown."""
    index = 1 if node.op_type == "Where" else 0
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.dtype


def has_kernel(node: ir.Node) -> bool:
    """Whether ONNX Runtime runs `node` on the CPU in the precision of its dtype; True where the table has no row."""
    if node.domain not in ONNX_DOMAINS or node.op_type not in KERNELS:
        return True
    dtype = computing_type(node)
    return dtype is None or dtype in KERNELS[node.op_type]

"""The table of kernels, held against the runtime: one model of one node for each operator and dtype."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from xform.graph.kernels import KERNELS, has_kernel

OPSET = 23
# Shapes of the operands that have the dtype in question; [2, 4] for operators of one operand, twice for those of two.
TWO = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Equal", "Less", "Concat", "Gemm", "MatMul")
SHAPES: dict[str, list[object]] = {
    **{name: [[4, 4], [4, 4]] for name in TWO},
    "Attention": [[1, 2, 3, 4]] * 3,
    "AveragePool": [[1, 2, 5, 5]],
    "BatchNormalization": [[2, 4], [4], [4], [4], [4]],
    "Conv": [[1, 2, 5, 5], [3, 2, 3, 3]],
    "ConvTranspose": [[1, 2, 5, 5], [2, 3, 3, 3]],
    "Einsum": [[4, 4], [4, 4]],
    "Expand": [[2, 4], np.array([2, 4])],
    "Gather": [[2, 4], np.array([0])],
    "GlobalAveragePool": [[1, 2, 5, 5]],
    "InstanceNormalization": [[2, 4, 5], [4], [4]],
    "LayerNormalization": [[2, 4], [4]],
    "MaxPool": [[1, 2, 5, 5]],
    "PRelu": [[2, 4], [4]],
    "Pad": [[2, 4], np.array([0, 0, 1, 0])],
    "RMSNormalization": [[2, 4], [4]],
    "Reshape": [[2, 4], np.array([8])],
    "RotaryEmbedding": [[1, 2, 3, 4], [1, 3, 2], [1, 3, 2]],
    "Slice": [[2, 4], np.array([0]), np.array([1])],
    "Squeeze": [[1, 4]],
    "Tile": [[2, 4], np.array([1, 2])],
    "Unsqueeze": [[2, 4], np.array([0])],
    "Where": [np.array([[True] * 4, [False] * 4]), [2, 4], [2, 4]],
}
ATTRIBUTES: dict[str, dict[str, object]] = {
    "AveragePool": {"kernel_shape": [2, 2]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Concat": {"axis": 0},
    "Cast": {"to": 1},
    "Einsum": {"equation": "ij,jk->ik"},
    "Split": {"num_outputs": 2, "axis": 1},
}


def model_of(op_type: str, dtype: ir.DataType) -> onnx.ModelProto | None:
    """One node; None where the standard does not allow the dtype."""
    inputs, constants = [], []
    for index, given in enumerate(SHAPES.get(op_type, [[2, 4]])):
        name = f"x{index}"
        if isinstance(given, np.ndarray):
            constants.append(onnx.numpy_helper.from_array(given, name))
        else:
            inputs.append(onnx.helper.make_tensor_value_info(name, int(dtype), given))
    names = [f"x{index}" for index in range(len(inputs) + len(constants))]
    outputs = ["y", "z"] if op_type == "Split" else ["y"]
    opset = 24 if op_type == "Swish" else OPSET
    node = onnx.helper.make_node(op_type, names, outputs, **ATTRIBUTES.get(op_type, {}))
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = onnx.helper.make_graph([node], "g", inputs, results, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=11)
    try:
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None
    return model


def loads(model: onnx.ModelProto) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # the runtime raises several kinds
        return False
    return True


DTYPES = sorted({dtype for dtypes in KERNELS.values() for dtype in dtypes})
COMPUTED_IN_FLOAT32 = {("Attention", ir.DataType.DOUBLE)}  # loads, but see the next test


@pytest.mark.parametrize("op_type", sorted(KERNELS))
def test_the_table_says_what_the_runtime_loads(op_type: str) -> None:
    found = {}
    for dtype in DTYPES:
        model = model_of(op_type, dtype)
        if model is not None and (op_type, dtype) not in COMPUTED_IN_FLOAT32:
            found[dtype] = loads(model)
    assert ir.DataType.FLOAT in found
    assert {dtype: dtype in KERNELS[op_type] for dtype in found} == found


def test_attention_in_float64_computes_its_scale_in_float32() -> None:
    model = model_of("Attention", ir.DataType.DOUBLE)
    assert model is not None
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("scale", 0.3))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 3, 4)) for _ in range(3))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x0": q, "x1": k, "x2": v})[0]
    logits = q @ k.swapaxes(-1, -2) * float(np.float32(0.3))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    assert 1e-10 < np.abs(got - expected).max() < 1e-6


def test_what_is_not_in_the_table_counts_as_running() -> None:
    half = ir.Value(name="x", type=ir.TensorType(ir.DataType.BFLOAT16))
    assert half.dtype is not None and half.dtype.numpy() == ml_dtypes.bfloat16
    assert has_kernel(ir.Node("", "Det", [half]))
    assert has_kernel(ir.Node("com.microsoft", "Conv", [half]))
    assert not has_kernel(ir.Node("", "Conv", [half, half]))
    assert has_kernel(ir.Node("", "Conv", [ir.Value(name="untyped"), None]))

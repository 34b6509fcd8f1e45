"""What the tests of reading ONNX models share: a small model, runs, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from xform.capture.onnx_file import capture_onnx
from xform.errors import ModelError
from xform.graph.write import to_bytes

RANDOM = np.random.default_rng(3)
FLOAT = TensorProto.FLOAT


def value(name: str, shape: list[int | str], kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def array(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(RANDOM.standard_normal(shape).astype(np.float32), name)


def make_proto(opset: int = 17, nodes: list[onnx.NodeProto] | None = None, **changes: Any) -> onnx.ModelProto:
    """y = relu(x @ w + b) with a dynamic batch; `nodes` replaces the nodes."""
    if nodes is None:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["xw"], name="product"),
            helper.make_node("Add", ["xw", "b"], ["s"], name="sum"),
            helper.make_node("Relu", ["s"], ["y"], name="activation"),
        ]
    graph = helper.make_graph(
        nodes, "g", [value("x", ["batch", 8])], [value("y", ["batch", 8])], [array("w", 8, 8), array("b", 8)]
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, **changes)


def run(proto: bytes, inputs: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(proto, options).run(None, inputs)  # type: ignore[no-any-return]


def assert_same(model: ir.Model, proto: onnx.ModelProto, inputs: dict[str, Any]) -> None:
    for got, expected in zip(run(to_bytes(model), inputs), run(proto.SerializeToString(), inputs), strict=True):
        np.testing.assert_array_equal(got, expected)


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        capture_onnx(source, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


X = {"x": RANDOM.standard_normal((3, 8)).astype(np.float32)}

"""What tests of the command line share: the outcome of a command, and a small model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass
class Run:
    """What a command left: its exit code, and what it wrote where."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        document: dict[str, Any] = json.loads(self.out)
        return document


def save_mlp(path: Path, *, weight: float = 1.0, hidden: int = 16, identity: bool = False) -> Path:
    """Linear, SiLU, Linear on [batch, 8], in opset 17; biases and weights are random."""
    rng = np.random.default_rng(0)
    initializers = {
        "fc1.weight": rng.standard_normal((8, hidden)),
        "fc1.bias": rng.standard_normal(hidden),
        "fc2.weight": rng.standard_normal((hidden, 4)) * weight,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "fc1.weight"], ["h"], name="/fc1/MatMul"),
        helper.make_node("Add", ["h", "fc1.bias"], ["b"], name="/fc1/Add"),
        helper.make_node("Sigmoid", ["b"], ["s"], name="/act/Sigmoid"),
        helper.make_node("Mul", ["s", "b"], ["a"], name="/act/Mul"),
        helper.make_node("MatMul", ["same" if identity else "a", "fc2.weight"], ["y"], name="/fc2/MatMul"),
    ]
    if identity:
        nodes.insert(4, helper.make_node("Identity", ["a"], ["same"], name="/id"))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path

"""One hostile case: how its folder is made, the command that is run on it, and the exit codes that are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

REFUSED = frozenset({3})
USAGE = frozenset({2})
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Dims = list[Any]


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: Class and name: "external/absolute".
        build: Fills a folder and gives the arguments of the command. The folder has `models` (which may be read),
            `work` (where the command runs and may write), and `outside` (canaries that nothing may read).
        expect: Exit codes that are right.
        poison: Run the command once, change the folder by this, and judge a second run.
    """

    name: str
    build: Callable[[Path], list[str]]
    expect: frozenset[int]
    poison: Callable[[Path], None] | None = None


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    """The model as a file in the folder of models."""
    path = folder / "models" / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def optimize(path: Path) -> list[str]:
    """Arguments that optimize a model into the folder of the run."""
    return ["optimize", str(path), "-o", "out.onnx"]


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Dims],
    outputs: dict[str, Dims | None],
    weights: dict[str, Any] | None = None,
    *,
    opset: int = 17,
    kinds: dict[str, int] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A small model; float32 unless `kinds` says otherwise."""
    kinds = kinds or {}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kinds.get(n, FLOAT), dims) for n, dims in inputs.items()],
        [helper.make_tensor_value_info(n, kinds.get(n, FLOAT), dims) for n, dims in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9, functions=functions or [])


def simple() -> onnx.ModelProto:
    """y = relu(x @ w + b); x has a dynamic batch."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal((8, 8)).astype("f"), "b": rng.standard_normal(8).astype("f")}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"], "product"),
        helper.make_node("Add", ["xw", "b"], ["s"], "sum"),
        helper.make_node("Relu", ["s"], ["y"], "act"),
    ]
    return model(nodes, {"x": ["batch", 8]}, {"y": ["batch", 8]}, weights)

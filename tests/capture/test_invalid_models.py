"""Models that no runtime can compute are refused at capture, with the node's name; what runs is not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_support import FLOAT, make_proto, value

from xform.capture.onnx_file import capture_onnx, notes
from xform.errors import LimitError, ModelError
from xform.graph.values import shape_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from hostile_invalid import invalid, one

CASES = dict(invalid())
RUNS = {"graphs/output-listed-twice"}  # odd, but every runtime runs it


@pytest.mark.parametrize("name", sorted(CASES.keys() - RUNS))
def test_refused(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        capture_onnx(CASES[name])
    assert "could not be read" not in caught.value.what, caught.value.what
    if any(node.name == "culprit" for node in CASES[name].graph.node) and "branch-reads" not in name:
        assert "culprit" in str(caught.value)


def test_wrong_value_info_refuses_nothing() -> None:
    """Exporters write down wrong shapes; ONNX's own inference refuses such a model, and runtimes run it."""
    proto = make_proto()
    proto.graph.value_info.append(value("s", [7, 7, 7]))
    model = capture_onnx(proto)
    assert shape_of(model.graph.outputs[0]) == ("batch", 8)


@pytest.mark.parametrize("declared", [[4, 8], [4], [9, 9], ["a", "b", "c"]])
def test_a_wrong_declared_output_shape_does_not_decide_the_data(declared: list[int | str]) -> None:
    nodes = [helper.make_node("Slice", ["x", "start", "end", "axis"], ["y"])]
    weights = {"start": [0], "end": [-1], "axis": [1]}
    graph = helper.make_graph(
        nodes, "g", [value("x", [4, 8])], [value("y", declared)],
        [numpy_helper.from_array(np.array(v), n) for n, v in weights.items()],
    )  # fmt: skip
    model = capture_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert shape_of(model.graph.outputs[0]) == (4, 7)
    assert any("'y' is declared with shape" in note for note in notes(model))


def test_a_wrong_declared_output_dtype_is_refused() -> None:
    proto = make_proto()
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(ModelError, match="declared as INT64"):
        capture_onnx(proto)


def test_nothing_valid_is_refused() -> None:
    """One fine node of several operators whose faults are looked for, at their edges."""
    f = np.ones((4, 4, 3, 3), np.float32)
    fine = [
        one("Conv", {"x": [1, 8, 5, 5]}, {"w": f}, group=2),
        one("Conv", {"x": [1, 4, 5, 5]}, {"w": f}, pads=[1, 1, 1, 1], strides=[2, 1], kernel_shape=[3, 3]),
        one("Transpose", {"x": [2, 3]}, perm=[1, 0]),
        one("Softmax", {"x": [2, 3, 4]}, axis=-3),
        one("Reshape", {"x": [2, 3, 4]}, {"s": np.array([0, -1, 2])}),
        one("Reshape", {"x": [0, 3]}, {"s": np.array([3, 0])}, allowzero=1),
        one("Split", {"x": [6, 2]}, out=3, axis=0),
        one("Split", {"x": [7, 2]}, out=3, axis=0, opset=18, num_outputs=3),
        one("LeakyRelu", {"x": [2]}, alpha=float("inf")),
        one("Gather", {"x": [5, 2]}, {"i": np.array([-5, 4])}),
    ]
    for proto in fine:
        capture_onnx(proto)


def doubling(start: str) -> onnx.ModelProto:
    """A value that is joined to itself forty times, from a constant or from a shape."""
    nodes = [helper.make_node("Shape", ["x"], ["c0"])] if start == "shape" else []
    nodes += [helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(40)]
    nodes += [
        helper.make_node("ReduceSum", ["c40"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["f"], to=FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    weights = [] if start == "shape" else [numpy_helper.from_array(np.arange(64), "c0")]
    graph = helper.make_graph(nodes, "g", [value("x", ["n"])], [value("y", ["n"])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("start", ["constant", "shape"])
def test_a_constant_that_doubles_itself_is_refused_as_a_shape(start: str) -> None:
    with pytest.raises(LimitError) as caught:
        capture_onnx(doubling(start))
    assert caught.value.limit == "memory"


@pytest.mark.parametrize("where", ["node", "value", "dim"])
def test_names_of_megabytes_are_refused_and_not_printed(where: str) -> None:
    proto, name = make_proto(), "n" * 10_000_000
    if where == "node":
        proto.graph.node[0].name = name
    elif where == "value":
        proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = name
    else:
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = name
    with pytest.raises(ModelError, match="10000000 characters") as caught:
        capture_onnx(proto)
    assert len(str(caught.value)) < 1000

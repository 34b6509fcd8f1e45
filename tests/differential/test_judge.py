"""The judge can fail: wrong optimizers are caught, right ones with other rounding are not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from differential_compare import differences, retyped, session, spread
from differential_graphs import Case, build
from differential_judge import judge
from differential_minimize import minimized
from onnx import TensorProto, helper, numpy_helper

F = TensorProto.FLOAT


def a_case(seed: int, rows: str | int = "N") -> Case:
    """softmax(x W) (1 + 1) with random weights, and three feeds."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((4, 3)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=-1),
        helper.make_node("Mul", ["b", "two"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.float32(2), "two")]
    inputs = [helper.make_tensor_value_info("x", F, [rows, 4])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", F, [rows, 3])], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = tuple({"x": rng.standard_normal((n, 4)).astype(np.float32)} for n in (2, 1, 0))
    return Case(0, 0, "exact", model, feeds, ())


@dataclass
class Made:
    """What a planted optimizer returns."""

    data: bytes

    @property
    def artifact(self) -> Any:
        return self

    @property
    def graph(self) -> ir.Model:
        return ir.from_proto(onnx.ModelProto.FromString(self.data))

    def to_bytes(self) -> bytes:
        return self.data

    @property
    def report(self) -> Any:
        return Report()


@dataclass
class Report:
    """No remarks."""

    remarks: list[Any] = field(default_factory=list)


def planted(change: Any) -> Any:
    """An optimizer that changes a copy of the model."""

    def optimize(model: onnx.ModelProto, **options: Any) -> Made:
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        change(copy)
        return Made(copy.SerializeToString())

    return optimize


def verdict(change: Any) -> str:
    return str(judge(a_case(1), lambda phase: None, optimize=planted(change)).verdict)


def test_the_same_graph_is_right() -> None:
    assert verdict(lambda model: None) == "ok"


def test_another_axis_is_wrong() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[1].attribute[0].i = 0

    assert verdict(change) == "wrong"


def test_a_weight_that_is_a_thousandth_off_is_wrong() -> None:
    def change(model: onnx.ModelProto) -> None:
        w = numpy_helper.to_array(model.graph.initializer[0]).copy()
        w[0, 0] *= 1.001
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w"))

    assert verdict(change) == "wrong"


def test_a_weight_that_is_rounded_otherwise_is_right() -> None:
    def change(model: onnx.ModelProto) -> None:
        w = numpy_helper.to_array(model.graph.initializer[0])
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.nextafter(w, np.float32(9)), "w"))

    assert verdict(change) == "ok"


def test_another_name_of_an_output_is_wrong() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = model.graph.node[2].output[0] = "z"

    assert verdict(change) == "wrong"


def test_another_rank_is_wrong() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.full((1, 1, 1), 2, np.float32), "two"))
        del model.graph.output[0].type.tensor_type.shape.dim[:]
        for size in ("?", "N", 3):
            dim = model.graph.output[0].type.tensor_type.shape.dim.add()
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = size

    assert verdict(change) == "wrong"


def test_a_result_that_does_not_load_has_crashed() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "MatMal"

    assert verdict(change) == "crashed"


def test_a_result_that_fails_on_no_rows_has_crashed() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([0, -1]), "shape"))
        model.graph.node[2].output[0] = "c"
        model.graph.node.append(helper.make_node("Reshape", ["c", "shape"], ["y"]))

    assert verdict(change) == "crashed"


def test_an_optimizer_that_changes_its_input_has_crashed() -> None:
    def optimize(model: onnx.ModelProto, **options: Any) -> Made:
        made = Made(model.SerializeToString())
        model.graph.name = "changed"
        return made

    assert judge(a_case(1), lambda phase: None, optimize=optimize).verdict == "crashed"


def test_an_error_that_is_not_documented_has_crashed() -> None:
    def optimize(model: onnx.ModelProto, **options: Any) -> Made:
        raise KeyError("permute")

    outcome = judge(a_case(1), lambda phase: None, optimize=optimize)
    assert outcome.verdict == "crashed" and "permute" in outcome.reason


def test_what_the_runtime_refuses_is_invalid() -> None:
    case = a_case(1)
    case.model.graph.node[0].op_type = "MatMal"
    assert judge(case, lambda phase: None).verdict == "invalid"


def test_small_numbers_beside_large_ones_are_compared() -> None:
    rng = np.random.default_rng(0)
    small, large = rng.random(90), 1e4 * rng.random(10)
    want = np.concatenate([small, large]).astype(np.float32)
    got = np.concatenate([small * 1.01, large]).astype(np.float32)
    assert differences([want], [got])


def test_nudging_moves_a_difference_of_nearly_equal_numbers_far_and_a_sum_little() -> None:
    def moved(kind: str, other: float) -> float:
        x = np.float32([[1.0, 2.0, 3.0]])
        nodes = [helper.make_node("Mul", ["x", "k"], ["m"]), helper.make_node(kind, ["x", "m"], ["y"])]
        tensors = [numpy_helper.from_array(np.float32(other), "k")]
        values = [helper.make_tensor_value_info(n, F, [1, 3]) for n in "xy"]
        model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors), ir_version=8)
        model.opset_import[0].version = 17
        want = session(model).run(None, {"x": x})
        found = spread(model, {"x": x}, want)
        assert found is not None
        return float((found[0] / np.abs(want[0])).max())

    assert moved("Sub", 1.000001) > 1e-2
    assert moved("Add", 1.000001) < 1e-5


@pytest.mark.parametrize("seed", [2, 9, 12])
def test_a_graph_in_another_float_type_runs_and_comes_back(seed: int) -> None:
    case = build(seed, "int8")
    there = retyped(case.model, TensorProto.FLOAT, TensorProto.BFLOAT16)
    assert all(t.data_type != TensorProto.FLOAT for t in there.graph.initializer)
    back = retyped(there, TensorProto.BFLOAT16, TensorProto.FLOAT)
    assert [t.data_type for t in back.graph.initializer] == [t.data_type for t in case.model.graph.initializer]


def test_a_failing_graph_is_made_smaller() -> None:
    def fails(case: Case) -> bool:
        return any(node.op_type == "Softmax" for node in case.model.graph.node)

    small = minimized(a_case(3), fails)
    assert [node.op_type for node in small.model.graph.node] == ["Softmax"]
    assert session(small.model).run(None, small.feeds[0])[0].shape == small.feeds[0]["a"].shape


def test_an_integer_that_went_farther_than_nudging_moves_it_is_wrong() -> None:
    x = np.float16([[0.5, 1.0, 2.0, 3.0]])
    nodes = [helper.make_node("Mul", ["x", "k"], ["m"]), helper.make_node("Cast", ["m"], ["y"], to=TensorProto.INT32)]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 4]),
        helper.make_tensor_value_info("y", TensorProto.INT32, [1, 4]),
    ]
    tensors = [numpy_helper.from_array(np.float16(50.0), "k")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors), ir_version=8)
    model.opset_import[0].version = 17
    want = session(model).run(None, {"x": x})
    moved = spread(model, {"x": x}, want)
    assert moved is not None and (moved[0] > 0).any()
    assert differences(want, [np.zeros_like(want[0])], moved)
    assert not differences(want, [want[0] - 1 * (moved[0] >= 1).astype(np.int32)], moved)


def test_a_failure_of_the_result_alone_is_not_excused() -> None:
    """On nothing ArgMax keeps the axis that it reduces, but that is no excuse for a result that fails elsewhere."""
    case = a_case(1)

    def optimize(model: onnx.ModelProto, **options: Any) -> Made:
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        shape = numpy_helper.from_array(np.int64([7, 11, 13]), "impossible")
        broken.graph.initializer.append(shape)
        last = broken.graph.output[0].name
        for node in broken.graph.node:
            node.output[:] = [f"{n} before" if n == last else n for n in node.output]
        broken.graph.node.append(helper.make_node("Reshape", [f"{last} before", "impossible"], [last], "late"))
        return Made(broken.SerializeToString())

    outcome = judge(case, lambda phase: None, optimize=optimize)
    assert outcome.verdict in ("crashed", "wrong") and not outcome.excused

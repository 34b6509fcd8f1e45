"""The passes around onnx-ir's and onnxscript's own: what they do, and above all what they must keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from support import apply, floats, ops, parse, rewritten, run

from xform.errors import XformError
from xform.graph.shapes import infer_shapes
from xform.graph.values import shape_of
from xform.passes.cleanup import (
    DeduplicateInitializers,
    EliminateCommonSubexpressions,
    FoldConstants,
    InferShapes,
    RemoveDeadCode,
)
from xform.passes.cleanup.library import LibraryPass
from xform.rewrite.passes import PassContext


def overridable(nodes: list[onnx.NodeProto], defaults: dict[str, np.ndarray], elem_type: int = 1) -> ir.Model:
    """A model with input x and inputs that have default values."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in defaults.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", elem_type, [2, 4])]
        + [helper.make_tensor_value_info(n, kinds[n], list(a.shape)) for n, a in defaults.items()],
        [helper.make_tensor_value_info("y", elem_type, None)],
        [onnx.numpy_helper.from_array(a, n) for n, a in defaults.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    infer_shapes(model)
    return model


# fold_constants


@pytest.mark.filterwarnings("error")
def test_folding_takes_the_logarithm_of_zero_without_a_warning_of_numpy() -> None:
    text = "g (float[2,3] x, float[3] d) => (float[2,3] y) { l = Log(d) e = Exp(l) y = Add(x, e) }"
    model, _ = rewritten(text, {"d": np.array([0, 1, 2], np.float32)}, {"x": floats(2, 3)}, FoldConstants())
    assert ops(model) == ["Add"]


def test_fold_arithmetic_on_constants() -> None:
    text = "g (float[2,4] x, float[4] a, float[4] b) => (float[2,4] y) { c = Mul(a, b) d = Sqrt(c) y = Add(x, d) }"
    constants = {"a": np.abs(floats(4)), "b": np.abs(floats(4))}
    model, _ = rewritten(text, constants, {"x": floats(2, 4)}, FoldConstants())
    assert ops(model) == ["Add"]


@pytest.mark.parametrize(
    ("data", "indices", "axis"),
    [((1, 512), (1, 128), 1), ((64, 1), (64, 1), 0), ((40, 3, 5), (7, 2, 5), 0), ((3, 4), (2, 9), -1)],
)
def test_fold_gathers_elements(data: tuple[int, ...], indices: tuple[int, ...], axis: int) -> None:
    """onnx's own evaluation fails at more than 32 choices, and of [64, 1] takes the other axis."""
    count = data[axis]
    where = np.random.default_rng(0).integers(-count, count, indices)
    shape = ",".join(map(str, indices))
    text = f"""g (float[{shape}] x, float[{",".join(map(str, data))}] d, int64[{shape}] i) => (float[{shape}] y) {{
        e = GatherElements<axis = {axis}>(d, i) y = Add(x, e) }}"""
    model, _ = rewritten(text, {"d": floats(*data), "i": where}, {"x": floats(*indices)}, FoldConstants())
    assert ops(model) == ["Add"]


@pytest.mark.parametrize(("data", "indices"), [((4,), [-5]), ((4,), [4]), ((2, 4), [[0]] * 3), ((1, 4), [[0]] * 3)])
def test_fold_leaves_what_a_runtime_refuses(data: tuple[int, ...], indices: list[Any]) -> None:
    where = np.array(indices)
    shape, sizes = ",".join(map(str, where.shape)), ",".join(map(str, data))
    text = f"""g (float[{shape}] x, float[{sizes}] d, int64[{shape}] i) => (float[{shape}] y) {{
        e = GatherElements<axis = -1>(d, i) y = Add(x, e) }}"""
    model = parse(text, {"d": floats(*data), "i": where})
    apply(model, FoldConstants())
    assert ops(model) == ["GatherElements", "Add"]


def test_fold_gathers_elements_in_branches() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = t () => (float[2] a) {
        d = Constant<value_floats = [1.0, 2.0, 3.0]>() i = Constant<value_ints = [2, 0]>()
        e = GatherElements(d, i) a = Add(x, e) }, else_branch = o () => (float[2] b) { b = Neg(x) }> }"""
    model, _ = rewritten(text, {}, {"c": np.array(True), "x": floats(2)}, FoldConstants())
    assert [node.op_type for node in model.graph.all_nodes()] == ["If", "Add", "Neg"]


def test_fold_keeps_the_default_of_an_input() -> None:
    model = overridable(
        [helper.make_node("Sqrt", ["w"], ["s"]), helper.make_node("Add", ["x", "s"], ["y"])],
        {"w": np.full(4, 4, np.float32)},
    )
    apply(model, FoldConstants())
    assert ops(model) == ["Sqrt", "Add"]
    x = floats(2, 4)
    np.testing.assert_allclose(run(model, {"x": x})[0], x + 2)
    np.testing.assert_allclose(run(model, {"x": x, "w": np.full(4, 9, np.float32)})[0], x + 3)


def test_fold_does_not_take_the_branch_that_an_overridable_condition_has_by_default() -> None:
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["x"], [f"{name}_y"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", 1, None)],
        )
        for name, op in (("then_branch", "Neg"), ("else_branch", "Exp"))
    }
    model = overridable([helper.make_node("If", ["c"], ["y"], **branches)], {"c": np.array(True)})
    apply(model, FoldConstants())
    assert ops(model) == ["If"]


def test_fold_leaves_random_operators() -> None:
    text = "g (float[2,2] x) => (float[2,2] y) { r = RandomNormal<shape=[2,2], seed=1.0>() y = Add(x, r) }"
    model = parse(text)
    apply(model, FoldConstants())
    assert ops(model) == ["RandomNormal", "Add"]


def test_fold_leaves_what_a_graph_output_names() -> None:
    text = "g (float[2,4] x, float[4] a) => (float[2,4] y, float[4] z) { z = Sqrt(a) y = Add(x, z) }"
    model, _ = rewritten(text, {"a": np.abs(floats(4))}, {"x": floats(2, 4)}, FoldConstants())
    assert [o.name for o in model.graph.outputs] == ["y", "z"]


def test_fold_does_not_grow_the_model() -> None:
    text = "g (float[1] x, float[1] a, int64[2] t) => (float[1024,1024] y) { e = Expand(a, t) y = Add(x, e) }"
    constants = {"a": floats(1), "t": np.array([1024, 1024])}
    model = parse(text, constants)
    apply(model, FoldConstants())
    assert ops(model) == ["Expand", "Add"]


@pytest.mark.parametrize(("a", "b"), [([-7, 7], [2, -2]), ([7, 9], [2, 4])])
def test_integer_division_rounds_as_onnx_does(a: list[int], b: list[int]) -> None:
    text = "g (int64[2] x, int64[2] a, int64[2] b) => (int64[2] y) { q = Div(a, b) y = Add(x, q) }"
    rewritten(text, {"a": np.array(a), "b": np.array(b)}, {"x": np.array([0, 0])}, FoldConstants())


def test_large_transposed_weight_becomes_lazy() -> None:
    text = "g (float[2,6] x, float[4,6] w) => (float[2,4] y) { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"
    model, _ = rewritten(text, {"w": floats(4, 6)}, {"x": floats(2, 6)}, FoldConstants(input_limit=8))
    assert ops(model) == ["MatMul"]
    weight = model.graph[0].inputs[1]
    assert weight is not None
    assert isinstance(weight.const_value, ir.LazyTensor)
    assert shape_of(weight) == (6, 4)
    assert "w" not in model.graph.initializers


def test_fold_takes_the_constant_branch_of_if() -> None:
    text = """g (float[2,4] x, bool c) => (float[2,4] y) {
        h = If (c) <then_branch = t () => (float[2,4] a) { a = Neg(x) }, else_branch = e () => (float[2,4] b)
            { b = Exp(x) }>
        y = Relu(h) }"""
    model, _ = rewritten(text, {"c": np.array(False)}, {"x": floats(2, 4)}, FoldConstants())
    assert ops(model) == ["Exp", "Relu"]


def test_fold_keeps_dynamic_dims_of_inputs() -> None:
    text = "g (float[batch,4] x) => (float[batch,4] y) { h = Identity(x) y = Relu(h) }"
    model = parse(text)
    model.graph[0].outputs[0].shape = ir.Shape([1, 4])
    apply(model, FoldConstants())
    assert shape_of(model.graph.inputs[0]) == ("batch", 4)


# eliminate_common_subexpressions


def test_equal_nodes_become_one() -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { a = Exp(x) b = Exp(x) y = Add(a, b) }"
    model, _ = rewritten(text, {}, {"x": floats(2, 4)}, EliminateCommonSubexpressions())
    assert ops(model) == ["Exp", "Add"]


def test_two_equal_outputs_keep_their_names() -> None:
    text = "g (float[2,4] x) => (float[2,4] y, float[2,4] z) { y = Exp(x) z = Exp(x) }"
    model, _ = rewritten(text, {}, {"x": floats(2, 4)}, EliminateCommonSubexpressions())
    assert [o.name for o in model.graph.outputs] == ["y", "z"]
    assert ops(model).count("Exp") == 1


def test_different_attributes_stay_apart() -> None:
    text = """g (float[2,4] x) => (float[2,4] y)
        { a = Softmax<axis=0>(x) b = Softmax<axis=1>(x) y = Add(a, b) }"""
    model, _ = rewritten(text, {}, {"x": floats(2, 4)}, EliminateCommonSubexpressions())
    assert ops(model) == ["Softmax", "Softmax", "Add"]


@pytest.mark.parametrize(
    "node", ["RandomNormalLike(x)", "Bernoulli(p)", "com.microsoft.Gelu(x)", "Dropout(x, ratio, train)"]
)
def test_random_and_foreign_nodes_stay_apart(node: str) -> None:
    text = f"""g (float[2,4] x, float ratio, bool train) => (float[2,4] y)
        {{ p = Sigmoid(x) a = {node} b = {node} y = Add(a, b) }}"""
    model = parse(text, {"ratio": np.array(0.5, np.float32), "train": np.array(True)})
    apply(model, EliminateCommonSubexpressions())
    assert len(ops(model)) == 4
    assert all("xform_apart" not in n.attributes for n in model.graph)


def test_nodes_with_subgraphs_stay_apart() -> None:
    branches = """If (c) <then_branch = t () => (float[2,4] {0}a) {{ {0}a = Neg(x) }},
        else_branch = e () => (float[2,4] {0}b) {{ {0}b = Exp(x) }}>"""
    nodes = f"p = {branches.format('p')} q = {branches.format('q')} y = Add(p, q)"
    text = f"g (float[2,4] x, bool c) => (float[2,4] y) {{ {nodes} }}"
    rewritten(text, {}, {"x": floats(2, 4), "c": np.array(True)}, EliminateCommonSubexpressions())


# deduplicate_initializers, remove_dead_code


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_equal_constants_become_one(dtype: str) -> None:
    kind = {"float32": "float", "float16": "float16", "int64": "int64"}[dtype]
    text = f"g ({kind}[4] x, {kind}[4] a, {kind}[4] b) => ({kind}[4] y) {{ c = Add(x, a) y = Add(c, b) }}"
    array = np.arange(4).astype(dtype)
    model, _ = rewritten(text, {"a": array, "b": array.copy()}, {"x": array}, DeduplicateInitializers())
    assert len(model.graph.initializers) == 1


def test_equal_bytes_of_another_type_or_shape_stay_apart() -> None:
    text = """g (float[1,4] x, int32[4] a, float[4] b, float[4,1] c) => (float[4,4] y)
        { d = Cast<to=1>(a) e = Add(x, d) f = Add(e, b) y = Add(f, c) }"""
    constants = {"a": np.zeros(4, np.int32), "b": np.zeros(4, np.float32), "c": np.zeros((4, 1), np.float32)}
    model, _ = rewritten(text, constants, {"x": floats(1, 4)}, DeduplicateInitializers())
    assert len(model.graph.initializers) == 3


def test_default_values_of_inputs_are_not_merged() -> None:
    model = overridable(
        [helper.make_node("Add", ["x", "a"], ["h"]), helper.make_node("Mul", ["h", "b"], ["y"])],
        {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)},
    )
    apply(model, DeduplicateInitializers())
    assert set(model.graph.initializers) == {"a", "b"}


def test_dead_nodes_and_weights_go_and_inputs_stay() -> None:
    text = "g (float[4] x, float[4] unused, float[4] w) => (float[4] y) { d = Add(x, w) y = Relu(x) }"
    model, remarks = rewritten(text, {"w": floats(4)}, {"x": floats(4), "unused": floats(4)}, RemoveDeadCode())
    assert ops(model) == ["Relu"]
    assert not model.graph.initializers
    assert [v.name for v in model.graph.inputs] == ["x", "unused"]
    assert "1 nodes removed, 1 constants removed" in [r.reason for r in remarks]


@pytest.mark.parametrize("source", ["Neg(x)", "Add(x, w)"])
def test_what_fed_only_a_removed_branch_goes_in_one_run(source: str) -> None:
    text = f"""g (float[2,4] x, float[4] w, bool c) => (float[2,4] y)
        {{ a = {source} u = If(c) <then_branch = t () => (float[2,4] p) {{ q = Exp(a) p = Abs(q) }},
        else_branch = e () => (float[2,4] r) {{ r = Identity(a) }}> y = Relu(x) }}"""
    model = parse(text, {"w": floats(4)})
    apply(model, RemoveDeadCode())
    assert ops(model) == ["Relu"]
    assert not model.graph.initializers
    assert not RemoveDeadCode().run(model, PassContext())


def test_weight_that_only_a_subgraph_reads_stays() -> None:
    text = """g (float[2,4] x, bool c, float[4] w) => (float[2,4] y) {
        y = If (c) <then_branch = t () => (float[2,4] a) { a = Add(x, w) }, else_branch = e () => (float[2,4] b)
            { b = Exp(x) }> }"""
    model, _ = rewritten(text, {"w": floats(4)}, {"x": floats(2, 4), "c": np.array(True)}, RemoveDeadCode())
    assert "w" in model.graph.initializers


def test_unused_opset_import_goes() -> None:
    model = parse("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    apply(model, RemoveDeadCode())
    assert set(model.opset_imports) == {""}


def test_infer_shapes_says_whether_it_learned_anything() -> None:
    model = parse("g (float[batch,4] x) => (float[batch,4] y) { h = Neg(x) y = Relu(h) }")
    model.graph[0].outputs[0].shape = None
    assert InferShapes().run(model, PassContext())
    assert shape_of(model.graph[0].outputs[0]) == ("batch", 4)
    assert not InferShapes().run(model, PassContext())


# the guard


class Renames(LibraryPass):
    name = "renames"

    def apply(self, model: ir.Model) -> bool:
        model.graph.outputs[0].name = "other"
        return True


class Fails(LibraryPass):
    name = "fails"

    def apply(self, model: ir.Model) -> bool:
        raise KeyError("inside the library")


def test_a_library_pass_that_renames_an_output_is_an_error() -> None:
    model = parse("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    with pytest.raises(XformError, match="renames changed the model's outputs"):
        Renames().run(model, PassContext())


def test_a_failure_inside_a_library_names_the_pass() -> None:
    model = parse("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    with pytest.raises(XformError, match="pass fails failed inside a library: KeyError"):
        Fails().run(model, PassContext())


def test_limit_stops_library_passes() -> None:
    model = parse("g (float[4] x) => (float[4] y) { d = Exp(x) y = Relu(x) }")
    assert not RemoveDeadCode().run(model, PassContext(limit=0))
    assert ops(model) == ["Exp", "Relu"]

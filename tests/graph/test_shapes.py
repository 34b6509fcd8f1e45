"""Shape inference: names kept, wrong shapes dropped, arithmetic followed, weights untouched."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from support import parse

from xform.graph.dims import add, at_most, broadcast, evaluate, exact_div, mul, symbols
from xform.graph.dims import parse as parse_dim
from xform.graph.shapes import infer_node, infer_shapes
from xform.graph.values import shape_of


def shapes(text: str, constants: dict[str, np.ndarray] | None = None) -> dict[str, tuple[int | str | None, ...] | None]:
    model = parse(text, constants or {})
    return {v.name or "": shape_of(v) for node in model.graph.all_nodes() for v in node.outputs}


def test_names_of_dims_are_kept() -> None:
    found = shapes("g (float[batch,seq,8] x, float[8,5] w) => (float[b,s,5] y) { h = MatMul(x, w) y = Relu(h) }")
    assert found == {"h": ("batch", "seq", 5), "y": ("b", "s", 5)}


def test_written_shape_that_contradicts_is_dropped() -> None:
    text = "g (float[batch,8] x, float[8,5] w) => (float[batch,5] y) <float[3,3] h> { h = MatMul(x, w) y = Relu(h) }"
    assert shapes(text)["h"] == ("batch", 5)


def test_written_rank_that_contradicts_is_dropped() -> None:
    text = "g (float[batch,8] x, float[8,5] w) => (y) <float[3,3,3] h> { h = MatMul(x, w) y = Relu(h) }"
    assert shapes(text) == {"h": ("batch", 5), "y": ("batch", 5)}


def test_written_shape_counts_where_nothing_can_be_derived() -> None:
    text = """g (float[batch,8] x) => (y) <float[batch,4] h>
        { h = com.microsoft.Mystery(x) y = Relu(h) }"""
    assert shapes(text)["y"] == ("batch", 4)


def test_wrong_output_shape_does_not_stop_inference() -> None:
    text = "g (float[batch,8] x, float[8,5] w) => (float[9,9,9] y) { h = MatMul(x, w) y = Relu(h) }"
    assert shapes(text)["h"] == ("batch", 5)


HEADS = """g (float[batch,seq,768] x) => (y) {
  s = Shape(x)
  b = Gather(s, i0)
  b1 = Unsqueeze(b, i0v)
  t = Concat<axis=0>(b1, minus, heads, width)
  r = Reshape(x, t)
  y = Transpose<perm=[0,2,1,3]>(r) }"""
INDICES = {
    "i0": np.array(0), "i0v": np.array([0]), "minus": np.array([-1]), "heads": np.array([12]), "width": np.array([64])
}  # fmt: skip


def with_inputs(text: str, constants: dict[str, np.ndarray]) -> str:
    declared = ", ".join(f"int64[{','.join(map(str, a.shape))}] {n}" for n, a in constants.items())
    return text.replace(") =>", f", {declared}) =>", 1)


def test_minus_one_in_a_head_split_is_the_sequence() -> None:
    found = shapes(with_inputs(HEADS, INDICES), INDICES)
    assert found["r"] == ("batch", "seq", 12, 64)
    assert found["y"] == ("batch", 12, "seq", 64)


def test_concat_of_past_and_present_is_a_sum() -> None:
    text = """g (float[batch,4,past,8] k, float[batch,4,seq,8] q) => (y)
        { c = Concat<axis=2>(k, q) t = Transpose<perm=[0,1,3,2]>(c) y = MatMul(q, t) }"""
    assert shapes(text)["y"] == ("batch", 4, "seq", "past + seq")


def test_merged_batch_and_sequence_is_a_product() -> None:
    constants = {"t": np.array([-1, 8])}
    assert shapes(with_inputs("g (float[batch,seq,8] x) => (y) { y = Reshape(x, t) }", constants), constants)["y"] in {
        (None, 8),  # a graph output takes no computed name ...
        ("batch*seq", 8),
    }
    text = with_inputs("g (float[batch,seq,8] x) => (y) { h = Reshape(x, t) y = Relu(h) }", constants)
    assert shapes(text, constants)["h"] == ("batch*seq", 8)


def test_slice_of_a_table_up_to_the_sequence_broadcasts_with_it() -> None:
    constants = {"zero": np.array([0]), "one": np.array([1]), "i1": np.array([1])}
    text = with_inputs(
        """g (int64[batch,seq] ids, float[1,512,8] table, float[batch,seq,8] x) => (y) {
          s = Shape(ids) n = Gather(s, i1) p = Slice(table, zero, n, one) h = Add(x, p) y = Relu(h) }""",
        constants,
    )
    found = shapes(text, constants)
    assert found["p"] == (1, "min(512, seq)", 8)
    assert found["h"] == ("batch", "seq", 8)


def test_subgraphs_are_inferred() -> None:
    text = """g (bool c, float[batch,8] x) => (y) {
        y = If (c) <then_branch = t () => (float[n,8] a) { a = Relu(x) }, else_branch = e () => (float[n,8] b)
            { h = Neg(x) b = Exp(h) }> }"""
    assert shapes(text)["h"] == ("batch", 8)


def test_second_run_changes_nothing() -> None:
    model = parse(with_inputs(HEADS, INDICES), INDICES)
    first = [shape_of(v) for n in model.graph for v in n.outputs]
    infer_shapes(model)
    assert [shape_of(v) for n in model.graph for v in n.outputs] == first


def test_generated_names_of_two_runs_do_not_mix() -> None:
    """Two unknown dims must never get one name: a new run numbers from zero again."""
    text = "g (float[n] x, float[n] z) => (p, q) { a = NonZero(x) b = NonZero(z) p = Cast<to=1>(a) q = Cast<to=1>(b) }"
    model = parse(text)
    model.graph[1].outputs[0].shape = ir.Shape([1, "unk__0"])
    infer_shapes(model)
    a, b = (shape_of(model.graph[i].outputs[0]) for i in (0, 1))
    assert a is not None and b is not None
    assert a[1] is None or a[1] != b[1]


def test_default_value_of_an_input_is_no_constant() -> None:
    shape = onnx.numpy_helper.from_array(np.array([2, 4]), "t")
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "t"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [8]), helper.make_tensor_value_info("t", 7, [2])],
        [helper.make_tensor_value_info("y", 1, None)],
        [shape],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    infer_shapes(model)
    assert shape_of(model.graph[0].outputs[0]) != (2, 4)


class Untouchable(ir.Tensor):
    """A tensor whose data must not be read."""

    def numpy(self) -> np.ndarray:
        raise AssertionError("the data of a large weight was read")

    tobytes = numpy  # type: ignore[assignment]


def test_large_weights_are_not_read() -> None:
    model = parse("g (float[batch,64] x, float[64,64] w) => (y) { y = MatMul(x, w) }", {"w": np.zeros((64, 64), "f4")})
    weight = model.graph.initializers["w"]
    weight.const_value = Untouchable(np.zeros((64, 64), np.float32), name="w")
    model.graph[0].outputs[0].shape = None
    infer_shapes(model)
    assert weight.const_value is not None
    assert model.graph[0].outputs[0].dtype == ir.DataType.FLOAT


def test_20000_nodes_in_seconds() -> None:
    nodes, last = [], "x"
    for index in range(5000):
        nodes += [
            helper.make_node("MatMul", [last, "w"], [f"a{index}"]),
            helper.make_node("Add", [f"a{index}", "b"], [f"c{index}"]),
            helper.make_node("Relu", [f"c{index}"], [f"d{index}"]),
            helper.make_node("Reshape", [f"d{index}", "t"], [f"e{index}"]),
        ]
        last = f"e{index}"
    arrays = {"w": np.zeros((64, 64), np.float32), "b": np.zeros(64, np.float32), "t": np.array([0, 0, -1])}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["batch", "seq", 64])],
        [helper.make_tensor_value_info(last, 1, None)],
        [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    start = time.process_time()
    infer_shapes(model)
    assert time.process_time() - start < 8
    assert shape_of(model.graph[-2].outputs[0]) == ("batch", "seq", 64)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (ir.node("Relu", [ir.val("x", ir.DataType.FLOAT, ["n", 4])]), ("n", 4)),
        (
            ir.node("Add", [ir.val("x", ir.DataType.FLOAT, ["n", 1, 4]), ir.val("z", ir.DataType.FLOAT, [3, 1])]),
            ("n", 3, 4),
        ),
        (ir.node("Transpose", [ir.val("x", ir.DataType.FLOAT, ["n", 2, 4])], {"perm": [1, 0, 2]}), (2, "n", 4)),
        (ir.node("Mystery", [ir.val("x", ir.DataType.FLOAT, ["n"])], domain="nowhere"), None),
        (ir.node("NoSuchOperator", [ir.val("x", ir.DataType.FLOAT, ["n"])]), None),
        (ir.node("MatMul", [ir.val("x", ir.DataType.FLOAT, [2, 3]), ir.val("z", ir.DataType.FLOAT, [4, 5])]), None),
    ],
)
def test_single_node(node: ir.Node, shape: tuple[int | str, ...] | None) -> None:
    infer_node(node, 23)
    assert shape_of(node.outputs[0]) == shape


@pytest.mark.parametrize("name", ["batch", "batch*seq", "past + seq", "2*s0 + 1", "s0//2", "batch-size", "s77 - 1"])
def test_dim_names_are_read_back(name: str) -> None:
    assert str(parse_dim(name)) == name
    assert parse_dim(str(parse_dim(name))) == parse_dim(name)


def test_dim_arithmetic() -> None:
    batch, seq = parse_dim("batch"), parse_dim("seq")
    assert exact_div(mul(mul(batch, seq), 768), mul(batch, 64)) == mul(12, seq)
    assert exact_div(mul(add(batch, 1), add(seq, 2)), add(seq, 2)) == add(batch, 1)
    assert exact_div(seq, 2) is None
    assert add(seq, mul(-1, seq)) == 0
    assert mul(batch, seq) == parse_dim("seq*batch")
    assert not isinstance(seq, int)
    assert broadcast(at_most(512, seq), seq) == seq
    assert broadcast(at_most(512, seq), batch) is None
    assert evaluate(add(parse_dim("2*batch*seq"), at_most(512, seq)), {"batch": 3, "seq": 600}) == 4112
    assert symbols(mul(at_most(512, seq), batch)) == {"batch", "seq"}

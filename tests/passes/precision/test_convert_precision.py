"""Float32 graphs in float16: one test for each rule of the pass, and the cases that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import apply, declared, missed, parse, run

from xform.errors import UsageError
from xform.graph.clone import clone
from xform.passes.precision import ConvertPrecision
from xform.rewrite.passes import PassContext
from xform.rewrite.remarks import RemarkLog

C = 64


def graph(body: str, outputs: str = f"float[n,5,{C}] y", **constants: Any) -> ir.Model:
    rng = np.random.default_rng(3)
    weights = {f"w{i}": (rng.normal(size=(C, C)) / 8).astype(np.float32) for i in range(2)}
    every = {**weights, "b": rng.normal(size=C).astype(np.float32), **constants}
    text = f"g (float[n,5,{C}] x, bool[n,5,1] m) => ({outputs}) {{ {body} }}"
    used = {k: v for k, v in every.items() if f"{k})" in body or f"{k}," in body}
    return parse(declared(text, used), used)


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {"x": rng.normal(size=(2, 5, C)).astype(np.float32), "m": rng.random((2, 5, 1)) < 0.5}


def converted(model: ir.Model, rtol: float = 2e-2) -> tuple[ir.Model, RemarkLog]:
    """After the pass, with numbers close to those before; a second run changes nothing."""
    before = clone(model)
    remarks = apply(model, ConvertPrecision())
    for got, want in zip(run(model, feeds()), run(before, feeds()), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * float(np.abs(want).max()))
    assert not ConvertPrecision().run(clone(model), PassContext())
    return model, remarks


def dtypes(model: ir.Model) -> dict[str, str]:
    """dtype of the first result of each operator but casts, by operator; the last one of its kind."""
    return {n.op_type: str(n.outputs[0].dtype) for n in model.graph if n.op_type != "Cast"}


def casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for node in model.graph)


def test_products_and_what_follows_are_one_region_with_two_casts():
    model, remarks = converted(graph("a = MatMul(x, w0) c = Add(a, b) d = Gelu(c) y = MatMul(d, w1)"))
    assert set(dtypes(model).values()) == {"FLOAT16"} and casts(model) == 2
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert [r.verdict for r in remarks] == ["applied"] and "4 nodes compute in float16" in next(iter(remarks)).reason


def test_the_interface_stays():
    model, _ = converted(graph("y = MatMul(x, w0)"))
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)][0::2] == [ir.DataType.FLOAT] * 2
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_norms_and_softmax_stay():
    model, remarks = converted(graph("a = MatMul(x, w0) c = LayerNormalization(a, b) d = MatMul(c, w1) y = Softmax(d)"))
    found = dtypes(model)
    assert (found["MatMul"], found["LayerNormalization"], found["Softmax"]) == ("FLOAT16", "FLOAT", "FLOAT")
    assert len(missed(remarks)) == 2


def test_a_cast_is_shared_by_its_readers():
    model, _ = converted(graph("a = MatMul(x, w0) c = MatMul(x, w1) y = Add(a, c)"))
    assert casts(model) == 2


@pytest.mark.parametrize("number", [-3.4e38, 1e5, 1e-12])
def test_what_reads_a_constant_that_float16_cannot_hold_stays(number: float):
    model, remarks = converted(graph("a = MatMul(x, w0) y = Where(m, a, k)", k=np.asarray(number, np.float32)))
    assert dtypes(model) == {"MatMul": "FLOAT16", "Where": "FLOAT"}
    assert "cannot hold" in missed(remarks)[0]


def test_infinity_and_small_numbers_beside_large_ones_are_held():
    k = np.asarray([np.inf, 1e-12, 1.0] + [0.5] * (C - 3), np.float32)
    model, _ = converted(graph("a = MatMul(x, w0) y = Min(a, k)", k=k))
    assert dtypes(model)["Min"] == "FLOAT16"


def test_weights_beyond_float16_stay():
    w = np.full((C, C), 1e5, np.float32)
    model, remarks = converted(graph("y = MatMul(x, w)", w=w))
    assert dtypes(model) == {"MatMul": "FLOAT"} and casts(model) == 0 and len(missed(remarks)) == 1


def test_positions_and_angles_stay():
    body = "i = Cast<to=1>(p) t = Mul(i, f) s = Sin(t) a = MatMul(x, w0) y = Add(a, s)"
    model, _ = converted(graph(body, p=np.arange(4000, 4000 + C), f=np.linspace(0.1, 1, C, dtype=np.float32)))
    found = dtypes(model)
    assert (found["Mul"], found["Sin"], found["Add"]) == ("FLOAT", "FLOAT", "FLOAT16")


def test_outputs_inside_a_region_are_float32_under_their_names():
    outputs = f"float[n,5,{C}] a, float[n,5,{C}] y, float[n,5,{C}] r"
    model, _ = converted(graph("a = MatMul(x, w0) y = MatMul(a, w1) r = LayerNormalization(a, b)", outputs))
    assert [v.name for v in model.graph.outputs] == ["a", "y", "r"] and casts(model) == 3


def test_subgraphs_stay_and_read_float32():
    body = """a = MatMul(x, w0) k = Cast<to=9>(a) j = ReduceMax<keepdims=0>(k)
        y = If(j) <then_branch = t () => (float[n,5,64] u) { u = Relu(a) },
                   else_branch = e () => (float[n,5,64] v) { v = Neg(a) }>"""
    model, _ = converted(graph(body))
    node = next(node for node in model.graph if node.op_type == "If")
    inner = node.attributes["then_branch"].as_graph()
    assert inner[0].inputs[0].dtype is ir.DataType.FLOAT and dtypes(model)["MatMul"] == "FLOAT16"


def test_small_products_begin_no_region():
    model = graph("y = MatMul(x, w)", "float[n,5,2] y", w=np.ones((C, 2), np.float32))
    assert not ConvertPrecision().run(model, PassContext())


def test_a_scale_that_is_fixed_to_float32_stays_so():
    body = 'a = MatMul(x, w0) c = Unsqueeze(a, ax) d = Resize<mode="nearest">(c, , sc) y = Squeeze(d, ax)'
    model, _ = converted(graph(body, f"float[n,5,{C}] y", ax=np.array([1]), sc=np.ones(4, np.float32)))
    assert dtypes(model)["Resize"] == "FLOAT16"


def test_nodes_that_were_asked_to_stay_do():
    model = graph("a = MatMul(x, w0) y = MatMul(a, w1)")
    model.graph[1].name = "second"
    remarks = apply(model, ConvertPrecision(keep=("second",)))
    assert model.graph[-1].outputs[0].dtype is ir.DataType.FLOAT and "asked to stay" in missed(remarks)[0]


def test_other_dtypes_are_refused():
    with pytest.raises(UsageError, match="makes float16"):
        ConvertPrecision("bfloat16").run(graph("y = MatMul(x, w0)"), PassContext())

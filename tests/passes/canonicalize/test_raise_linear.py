"""raise_linear: every Gemm and MatMul form to one spelling."""

from __future__ import annotations

import numpy as np
import pytest
from support import applied, floats, missed, ops, rewritten

from xform.graph.values import constant
from xform.passes.canonicalize.raise_linear import RaiseLinear


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("bias", ["none", "constant", "input"])
def test_gemm(trans_a: int, trans_b: int, alpha: float, beta: float, bias: str) -> None:
    x, w = floats(5, 3), floats(3, 4)
    feeds = {"x": x.T.copy() if trans_a else x, "c": floats(4)}
    constants = {"w": w.T.copy() if trans_b else w}
    if bias != "input":
        constants["c"] = feeds.pop("c")
    a, b = ("3,5" if trans_a else "5,3"), ("4,3" if trans_b else "3,4")
    text = f"""g (float[{a}] x, float[{b}] w, float[4] c) => (float[5,4] out)
    {{ out = Gemm <alpha = {alpha}, beta = {beta}, transA = {trans_a}, transB = {trans_b}>
       (x, w{"" if bias == "none" else ", c"}) }}"""
    model, remarks = rewritten(text, constants, feeds, RaiseLinear())
    assert applied(remarks, "gemm") == 1 and "Gemm" not in ops(model)
    product = next(n for n in model.graph if n.op_type == "MatMul")
    weight = constant(product.inputs[1])
    assert weight is not None
    np.testing.assert_allclose(weight, alpha * w, rtol=1e-6)


def test_a_weight_that_is_an_input_is_left() -> None:
    text = "g (float[5,3] x, float[3,4] w) => (float[5,4] out) { out = Gemm(x, w) }"
    model, remarks = rewritten(text, {}, {"x": floats(5, 3), "w": floats(3, 4)}, RaiseLinear())
    assert ops(model) == ["Gemm"] and len(remarks) == 0


def test_transposed_weights_biases_in_front_and_with_leading_ones() -> None:
    text = """g (float[2,5,3] x, float[4,3] w, float[1,1,4] b) => (float[2,5,4] out)
    { t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, t)  out = Add(b, p) }"""
    model, remarks = rewritten(text, {"w": floats(4, 3), "b": floats(1, 1, 4)}, {"x": floats(2, 5, 3)}, RaiseLinear())
    assert ops(model) == ["MatMul", "Add"] and missed(remarks) == []
    add = model.graph[1]
    assert add.inputs[0].producer() is model.graph[0] and tuple(add.inputs[1].shape) == (4,)  # type: ignore[union-attr,arg-type]


def test_a_bias_that_adds_a_dimension_keeps_its_shape() -> None:
    text = "g (float[5,3] x, float[3,4] w, float[1,1,4] b) => (float[1,5,4] out) { p = MatMul(x, w)  out = Add(p, b) }"
    model, _ = rewritten(text, {"w": floats(3, 4), "b": floats(1, 1, 4)}, {"x": floats(5, 3)}, RaiseLinear())
    assert tuple(model.graph[1].inputs[1].shape) == (1, 1, 4)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("alpha", "beta", "fires"),
    [(1e5, 1.0, False), (1e-8, 1.0, False), (1.0, 1e5, False), (2.0, 0.5, True), (1.0, 1e-7, True)],
)
def test_factors_that_float16_weights_cannot_take_are_left(alpha: float, beta: float, fires: bool) -> None:
    rng = np.random.default_rng(5)
    constants = {"w": rng.standard_normal((3, 4)).astype("float16"), "c": rng.standard_normal(4).astype("float16")}
    feeds = {"x": (rng.standard_normal((5, 3)) * 1e-3).astype("float16")}
    text = f"""g (float16[5,3] x, float16[3,4] w, float16[4] c) => (float16[5,4] out)
    {{ out = Gemm <alpha = {alpha:f}, beta = {beta:f}> (x, w, c) }}"""
    text = text.replace("0.000000,", f"{alpha:.9f},").replace("= 0.000000>", f"= {beta:.9f}>")
    _, remarks = rewritten(text, constants, feeds, RaiseLinear(), rtol=2e-2, atol=1e-2)
    assert applied(remarks, "gemm") == fires
    assert fires or "float16" in missed(remarks)[0].lower()

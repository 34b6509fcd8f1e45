"""raise_layer_norm and raise_rms_norm: one case per spelling, and the ones that must be left alone."""

from __future__ import annotations

import numpy as np
import pytest
from support import applied, floats, missed, ops, rewritten

from xform.graph.values import constant
from xform.passes.canonicalize.raise_layer_norm import RaiseLayerNorm
from xform.passes.canonicalize.raise_rms_norm import RaiseRMSNorm

ONE = {"eps": np.float32(1e-5), "two": np.float32(2), "half": np.float32(0.5), "one": np.float32(1)}
AXES = {"axes": np.array([-1], np.int64)}
W = {"w": floats(8), "b": floats(8)}
X = {"x": floats(2, 5, 8) * 3 + 1}
HEADER = (
    "g (float[B,5,8] x, float[8] w, float[8] b, float eps, float two, float half, float one, int64[1] axes)"
    " => (float[B,5,8] out)"
)
CENTER = "m = ReduceMean(x, axes)  d = Sub(x, m) "
VARIANCES = {
    "pow": "q = Pow(d, two)  v = ReduceMean(q, axes)  s = Add(v, eps) ",
    "mul": "q = Mul(d, d)  v = ReduceMean(q, axes)  s = Add(eps, v) ",
}
QUOTIENTS = {
    "div": "r = Sqrt(s)  n = Div(d, r) ",
    "reciprocal": "r = Sqrt(s)  i = Reciprocal(r)  n = Mul(i, d) ",
    "one_over": "r = Sqrt(s)  i = Div(one, r)  n = Mul(d, i) ",
    "power": "r = Pow(s, half)  n = Div(d, r) ",
}
AFFINES = {
    "none": ("out = Identity(n)", 0),
    "scale": ("out = Mul(w, n)", 1),
    "both": ("a = Mul(n, w)  out = Add(b, a)", 2),
}


def norm_graph(variance: str, quotient: str, affine: str) -> str:
    return f"{HEADER} {{ {CENTER} {VARIANCES[variance]} {QUOTIENTS[quotient]} {AFFINES[affine][0]} }}"


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize("affine", AFFINES)
def test_layer_norm_spellings(variance: str, quotient: str, affine: str) -> None:
    model, remarks = rewritten(norm_graph(variance, quotient, affine), ONE | W | AXES, X, RaiseLayerNorm())
    norms = [n for n in model.graph if n.op_type == "LayerNormalization"]
    assert len(norms) == applied(remarks, "decomposed") == 1
    assert set(ops(model)) <= {"LayerNormalization", "Identity"}
    assert applied(remarks, "scale") + applied(remarks, "bias") == AFFINES[affine][1]
    scale = constant(norms[0].inputs[1])
    assert scale is not None
    np.testing.assert_allclose(scale, 1 if affine == "none" else W["w"])


def test_layer_norm_over_two_axes() -> None:
    axes = {"axes": np.array([1, 2], np.int64)}
    model, _ = rewritten(norm_graph("pow", "div", "none"), ONE | W | axes, X, RaiseLayerNorm())
    assert model.graph[0].attributes["axis"].value == -2


def test_layer_norm_of_channels_first() -> None:
    text = """g (float[B,6,H,W] x, float[6,1,1] w, float eps, float two, int64[1] axes) => (float[B,6,H,W] out)
    { m = ReduceMean(x, axes)  d = Sub(x, m)  q = Pow(d, two)  v = ReduceMean(q, axes)  s = Add(v, eps)
      r = Sqrt(s)  n = Div(d, r)  out = Mul(n, w) }"""
    constants = ONE | {"w": floats(6, 1, 1), "axes": np.array([1], np.int64)}
    model, remarks = rewritten(text, constants, {"x": floats(2, 6, 3, 5)}, RaiseLayerNorm())
    assert ops(model) == ["Transpose", "LayerNormalization", "Transpose", "Mul"]
    assert applied(remarks, "channel_first") == 1 and missed(remarks) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (norm_graph("pow", "div", "none").replace("ReduceMean(q, axes)", "ReduceMean(q, other)"), "mean over axes"),
        (norm_graph("pow", "div", "none").replace("v = ReduceMean(q, axes)", "v = ReduceSum(q, axes)"), "wanted"),
    ],
)
def test_almost_a_layer_norm_is_left_and_told(text: str, reason: str) -> None:
    text = text.replace("int64[1] axes", "int64[1] axes, int64[1] other")
    constants = ONE | W | AXES | {"other": np.array([1], np.int64)}
    _, remarks = rewritten(text, constants, X, RaiseLayerNorm())
    assert applied(remarks, "decomposed") == 0 and any(reason in m for m in missed(remarks))


def test_an_affine_that_is_read_elsewhere_or_varies_over_rows_stays() -> None:
    text = """g (float[2,5,8] x, float[8] w, float[5,1] rows) => (float[2,5,8] out, float[2,5,8] raw, float[2,5,8] two)
    { raw = LayerNormalization(x, w)  out = Mul(raw, w)  n = LayerNormalization(x, w)  two = Mul(n, rows) }"""
    model, remarks = rewritten(text, W | {"rows": floats(5, 1)}, X, RaiseLayerNorm())
    assert len(remarks) == 0 and ops(model).count("Mul") == 2


RMS = {
    "sqrt_div": "q = Pow(x, two)  v = ReduceMean(q, axes)  s = Add(v, eps)  r = Sqrt(s)  n = Div(x, r) ",
    "rsqrt": "q = Mul(x, x)  v = ReduceMean(q, axes)  s = Add(v, eps)  r = Sqrt(s)  i = Reciprocal(r)  n = Mul(x, i) ",
}


@pytest.mark.parametrize("spelling", RMS)
@pytest.mark.parametrize("affine", ["none", "scale"])
def test_rms_norm_spellings(spelling: str, affine: str) -> None:
    text = f"{HEADER} {{ {RMS[spelling]} {AFFINES[affine][0]} }}"
    model, remarks = rewritten(text, ONE | W | AXES, X, RaiseRMSNorm())
    assert applied(remarks, "decomposed") == 1 and ops(model).count("RMSNormalization") == 1
    assert "Mul" not in ops(model)


def test_rms_norm_in_half_precision_keeps_float_statistics() -> None:
    text = """g (float16[2,5,8] x, float16[8] w, float eps, float two, int64[1] axes) => (float16[2,5,8] out)
    { c = Cast <to = 1> (x)  q = Pow(c, two)  v = ReduceMean(q, axes)  s = Add(v, eps)  r = Sqrt(s)
      i = Reciprocal(r)  n = Mul(c, i)  h = Cast <to = 10> (n)  out = Mul(w, h) }"""
    constants = ONE | AXES | {"w": floats(8, dtype="float16")}
    model, _ = rewritten(text, constants, {"x": floats(2, 5, 8, dtype="float16")}, RaiseRMSNorm(), rtol=2e-3, atol=2e-3)
    assert ops(model) == ["RMSNormalization"]
    assert model.graph[0].attributes["stash_type"].value == 1


def test_a_layer_norm_is_no_rms_norm() -> None:
    _, remarks = rewritten(norm_graph("mul", "div", "scale"), ONE | W | AXES, X, RaiseLayerNorm(), RaiseRMSNorm())
    assert applied(remarks, "decomposed") == 1

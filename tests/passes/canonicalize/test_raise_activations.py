"""raise_gelu, raise_activation and raise_softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support import applied, floats, missed, ops, rewritten

from xform.passes.canonicalize.raise_activation import RaiseActivation
from xform.passes.canonicalize.raise_gelu import RaiseGelu
from xform.passes.canonicalize.raise_softmax import RaiseSoftmax

X = {"x": floats(3, 7) * 2}
NUMBERS = {
    "root": math.sqrt(2),
    "iroot": math.sqrt(0.5),
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "zero": 0.0,
    "six": 6.0,
    "cubic": 0.044715,
    "slope": math.sqrt(2 / math.pi),
    "sixth": 1 / 6,
    "wrong": 0.71,
}
CONSTANTS = {k: np.float32(v) for k, v in NUMBERS.items()}
HEADER = f"g (float[3,7] x, {', '.join(f'float {k}' for k in NUMBERS)}) => (float[3,7] out)"

ERF = {
    "div": "a = Div(x, root)  e = Erf(a)  g = Add(e, one)  p = Mul(x, g)  out = Mul(p, half)",
    "mul": "a = Mul(iroot, x)  e = Erf(a)  g = Add(one, e)  h = Mul(half, x)  out = Mul(h, g)",
    "halved_gate": "a = Mul(x, iroot)  e = Erf(a)  g = Add(e, one)  h = Mul(g, half)  out = Mul(x, h)",
    "over_two": "a = Div(x, root)  e = Erf(a)  g = Add(e, one)  p = Mul(x, g)  out = Div(p, two)",
}
TANH = {
    "pow": "c = Pow(x, three)  d = Mul(c, cubic)  s = Add(x, d)  i = Mul(s, slope)  t = Tanh(i)  g = Add(t, one)"
    "  h = Mul(x, half)  out = Mul(h, g)",
    "products": "q = Mul(x, x)  c = Mul(x, q)  d = Mul(cubic, c)  s = Add(d, x)  i = Mul(slope, s)  t = Tanh(i)"
    "  g = Add(one, t)  p = Mul(x, g)  out = Mul(half, p)",
    "drawn_out": "q = Mul(x, x)  d = Mul(cubic, q)  s = Add(one, d)  y = Mul(x, slope)  i = Mul(y, s)  t = Tanh(i)"
    "  g = Add(one, t)  p = Mul(x, g)  out = Mul(half, p)",
}


@pytest.mark.parametrize("spelling", ERF)
def test_gelu_by_erf(spelling: str) -> None:
    model, remarks = rewritten(f"{HEADER} {{ {ERF[spelling]} }}", CONSTANTS, X, RaiseGelu())
    assert ops(model) == ["Gelu"] and applied(remarks, "erf") == 1
    assert model.graph[0].attributes["approximate"].value == "none"


@pytest.mark.parametrize("spelling", TANH)
def test_gelu_by_tanh(spelling: str) -> None:
    model, remarks = rewritten(f"{HEADER} {{ {TANH[spelling]} }}", CONSTANTS, X, RaiseGelu())
    assert ops(model) == ["Gelu"] and applied(remarks, "tanh") == 1
    assert model.graph[0].attributes["approximate"].value == "tanh"


def test_a_wrong_constant_is_another_function_and_is_told() -> None:
    text = f"{HEADER} {{ {ERF['mul'].replace('iroot', 'wrong')} }}"
    model, remarks = rewritten(text, CONSTANTS, X, RaiseGelu())
    assert "Gelu" not in ops(model) and applied(remarks, "erf") == 0


@pytest.mark.parametrize("op_type", ["Gelu", "FastGelu"])
def test_gelu_of_onnx_runtime(op_type: str) -> None:
    text = f"g (float[3,7] x, float[7] b) => (float[3,7] out) {{ out = com.microsoft.{op_type}(x{{bias}}) }}"
    text = text.replace("{bias}", ", b" if op_type == "FastGelu" else "")
    model, _ = rewritten(text, {"b": floats(7)}, X, RaiseGelu(), atol=2e-6)
    assert ops(model)[-1] == "Gelu"


CASES = {
    "sigmoid": ("n = Neg(x)  e = Exp(n)  d = Add(one, e)  out = Div(one, d)", ["Sigmoid"]),
    "sigmoid_reciprocal": ("n = Neg(x)  e = Exp(n)  d = Add(e, one)  out = Reciprocal(d)", ["Sigmoid"]),
    "silu_quotient": ("n = Neg(x)  e = Exp(n)  d = Add(e, one)  out = Div(x, d)", ["Sigmoid", "Mul"]),
    "silu_order": ("s = Sigmoid(x)  out = Mul(s, x)", ["Sigmoid", "Mul"]),
    "hard_swish": ("a = Add(x, three)  c = Clip(a, zero, six)  p = Mul(x, c)  out = Div(p, six)", ["HardSwish"]),
    "hard_swish_sixth": (
        "a = Add(x, three)  c = Clip(a, zero, six)  h = Mul(c, sixth)  out = Mul(x, h)",
        ["HardSwish"],
    ),
    "hard_sigmoid": ("a = Add(x, three)  c = Clip(a, zero, six)  out = Div(c, six)", ["HardSigmoid"]),
    "mish": ("s = Softplus(x)  t = Tanh(s)  out = Mul(x, t)", ["Mish"]),
}


@pytest.mark.parametrize("case", CASES)
def test_gated_activations(case: str) -> None:
    body, expected = CASES[case]
    model, _ = rewritten(f"{HEADER} {{ {body} }}", CONSTANTS, X, RaiseActivation())
    assert ops(model) == expected
    if expected[-1] == "Mul":
        assert model.graph[-1].inputs[0].name == "x"  # type: ignore[union-attr]


def test_softmax_from_its_parts() -> None:
    text = """g (float[3,7] x, int64[1] axes) => (float[3,7] out)
    { m = ReduceMax(x, axes)  d = Sub(x, m)  e = Exp(d)  s = ReduceSum(e, axes)  out = Div(e, s) }"""
    model, _ = rewritten(text, {"axes": np.array([0], np.int64)}, X, RaiseSoftmax())
    assert ops(model) == ["Softmax"] and model.graph[0].attributes["axis"].value == 0


def test_softmax_without_the_maximum_is_left() -> None:
    text = """g (float[3,7] x, int64[1] axes) => (float[3,7] out)
    { e = Exp(x)  s = ReduceSum(e, axes)  out = Div(e, s) }"""
    model, _ = rewritten(text, {"axes": np.array([1], np.int64)}, X, RaiseSoftmax())
    assert "Softmax" not in ops(model)


def test_softmax_between_transposes() -> None:
    text = """g (float[2,3,4] x) => (float[2,3,4] out)
    { a = Transpose <perm = [0, 2, 1]> (x)  b = Softmax <axis = 2> (a)  out = Transpose <perm = [0, 2, 1]> (b) }"""
    model, remarks = rewritten(text, {}, {"x": floats(2, 3, 4)}, RaiseSoftmax())
    assert ops(model) == ["Softmax"] and model.graph[0].attributes["axis"].value == 1 and missed(remarks) == []

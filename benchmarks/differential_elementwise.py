"""Motifs of numbers one by one: arithmetic with neutral and nearly neutral constants, casts, comparisons, integers."""

from __future__ import annotations

import numpy as np
from differential_registry import any_float, any_value, integers, motif
from differential_sketch import BOOL, F16, F32, F64, I32, I64, U8, Sketch, Value

_UNARY = (
    *("Abs", "Neg", "Relu", "Sigmoid", "Tanh", "Floor", "Ceil", "Sign", "Sin", "Cos", "Atan", "Softplus", "Softsign"),
    *("Erf", "Elu", "Selu", "LeakyRelu", "HardSigmoid", "ThresholdedRelu", "Round", "Identity", "Celu"),
)


@motif(any_float)
def unary(s: Sketch, x: Value) -> Value:
    """One elementwise operator, sometimes twice."""
    kind = s.pick(*_UNARY)
    attributes = {}
    if kind in ("Elu", "LeakyRelu", "ThresholdedRelu", "Celu") and s.chance(0.6):
        attributes["alpha"] = float(s.pick(0.01, 0.3, 1.0))
    y = s.op(kind, x, dims=x.dims, **attributes)
    if s.chance(0.25):
        y = s.op(kind, y, dims=x.dims, **attributes)
    return y


@motif(any_float)
def rounding_chain(s: Sketch, x: Value) -> Value:
    """Idempotent operators in a row, with another one between them now and then."""
    kind = s.pick("Relu", "Abs", "Floor", "Ceil", "Round", "Sign", "Neg")
    y = s.op(kind, x, dims=x.dims)
    if s.chance(0.2):
        y = s.mul(y, 0.5)
    return s.op(kind, y, dims=y.dims)


@motif(any_float)
def positive_functions(s: Sketch, x: Value) -> Value:
    """Functions that need a domain of their own, on operands that stay inside it."""
    kind = s.pick("Sqrt", "Log", "Reciprocal", "Exp", "Asin", "Acos", "Asinh", "Atanh", "Acosh", "Sinh", "Tan", "Cosh")
    if kind in ("Sqrt", "Log", "Reciprocal"):
        return s.op(kind, s.add(s.op("Abs", x, dims=x.dims), 0.5))
    if kind == "Acosh":
        return s.op(kind, s.add(s.op("Abs", x, dims=x.dims), 1.5))
    bounded = s.op("Tanh", x, dims=x.dims)
    return s.op(kind, s.mul(bounded, 0.7) if kind in ("Asin", "Acos", "Atanh") else bounded)


@motif(any_float, weight=2.0)
def neutral(s: Sketch, x: Value) -> Value:
    """An operand that changes nothing, or nearly: of more axes, of another number, on the other side."""
    kind, number = s.pick(("Add", 0.0), ("Sub", 0.0), ("Mul", 1.0), ("Div", 1.0), ("Pow", 1.0))
    number = s.near(number, 1e-3, -1.0, 2.0)
    shape = s.pick((), (1,), (1,) * x.rank, (1,) * (x.rank + 1), (x.last or 1,), (2, 1) if x.rank < 2 else (1,))
    c = s.const(np.full(shape, number, s.numpy).astype(_np(x)))
    if kind in ("Pow", "Div", "Sub") and s.chance(0.85):
        return s.op(kind, x, c)
    return s.either(kind, x, c) if kind in ("Add", "Mul") else s.op("Mul", x, c)


@motif(any_float)
def self_arithmetic(s: Sketch, x: Value) -> Value:
    """x - x, x / x, x * 0 and the like: not zero or one where x is not finite."""
    form = s.pick("sub", "zero", "double", "square", "power")
    if form == "sub":
        return s.add(s.op("Sub", x, x), x) if s.chance(0.5) else s.op("Sub", x, x)
    if form == "zero":
        return s.add(s.mul(x, 0.0), x) if s.chance(0.5) else s.mul(x, 0.0)
    if form == "double":
        return s.op("Add", x, x)
    if form == "square":
        return s.op("Mul", x, x) if s.chance(0.5) else s.op("Pow", x, s.near(2.0, 3.0))
    return s.op("Pow", s.op("Abs", x, dims=x.dims), s.pick(0.5, 1.5, 0.0, 1.0))


@motif(any_float)
def affine(s: Sketch, x: Value) -> Value:
    """Factors and shifts in a row, scalar or per channel, one of them sometimes computed."""
    y = x
    for _ in range(int(s.rng.integers(1, 4))):
        c: Value | float = float(np.round(s.rng.uniform(0.5, 1.5), 3))
        if x.last and x.dtype == s.dtype and s.chance(0.5):
            c = s.vector(x.last, around=1.0)
        kind = s.pick("Mul", "Add", "Sub", "Mul")
        y = s.either(kind, y, c) if kind != "Sub" else s.op("Sub", y, c)
    return y


@motif(any_float)
def two_values(s: Sketch, x: Value) -> Value:
    """An operator of two computed values of one shape."""
    other = next((v for v in reversed(s.live) if v.dims == x.dims and v.dtype == x.dtype and v is not x), None)
    y = other if other is not None else s.op("Tanh", x, dims=x.dims)
    kind = s.pick("Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum", "PRelu", "Div")
    if kind == "Div":
        return s.op("Div", x, s.add(s.op("Abs", y, dims=y.dims), 0.7))
    return s.op(kind, x, y)


@motif(any_float)
def several_values(s: Sketch, x: Value) -> Value:
    """Max, Min, Sum and Mean of one to three operands."""
    operands: list[Value | float] = [x, 0.25, s.op("Neg", x, dims=x.dims)][: int(s.rng.integers(1, 4))]
    return s.op(s.pick("Max", "Min", "Sum", "Mean"), *operands)


@motif(any_float)
def clipped(s: Sketch, x: Value) -> Value:
    """Clip with both bounds, one, none, or bounds in the wrong order."""
    low, high = s.pick((-1.0, 1.0), (None, 0.5), (-0.5, None), (None, None), (0.0, 6.0), (0.0, None))
    y = s.clip(x, low, high)
    return s.clip(y, -0.7, 0.6) if s.chance(0.2) else y


@motif(any_float)
def chosen(s: Sketch, x: Value) -> Value:
    """Where by a comparison, one branch a number."""
    kind = s.pick("Less", "Greater", *(("LessOrEqual", "GreaterOrEqual") if s.opset >= 12 else ()))
    condition = s.op(kind, x, s.near(0.1, -50.0, 50.0), dtype=BOOL)
    if s.chance(0.3):
        condition = s.op("Not", condition, dims=condition.dims, dtype=BOOL)
        condition = s.op("Not", condition, dims=condition.dims, dtype=BOOL) if s.chance(0.4) else condition
    y = s.op("Tanh", x, dims=x.dims)
    pair: tuple[Value | float, Value | float] = s.pick((x, y), (y, 0.3), (0.0, x))
    first, second = (v if isinstance(v, Value) else s.literal(v, x) for v in pair)
    return s.op("Where", condition, first, second, dtype=x.dtype)


@motif(any_float)
def logic(s: Sketch, x: Value) -> Value:
    """Booleans combined, with neutral constants among them, and cast back."""
    a = s.op("Greater", x, 0.0, dtype=BOOL)
    b = s.op("Less", x, 1.0, dtype=BOOL)
    kind, constant = s.pick(("And", True), ("Or", False), ("Xor", False), ("And", False), ("Or", True))
    c = s.op(kind, a, s.const(np.full((1,) * s.pick(0, 1, a.rank), constant)), dtype=BOOL)
    d = s.op(s.pick("And", "Or", "Xor"), c, b, dtype=BOOL)
    return s.add(s.cast(d, x.dtype), x)


@motif(any_float)
def nan_guard(s: Sketch, x: Value) -> Value:
    """IsNaN and IsInf as guards."""
    if x.dtype == F64 and s.chance(0.3):
        x = s.cast(x, F32)
    kind = "IsNaN" if x.dtype == F16 or s.chance(0.6) else "IsInf"
    test = s.op(kind, x, dims=x.dims, dtype=BOOL)
    return s.op("Where", test, s.literal(0.0, x), x, dtype=x.dtype)


@motif(any_float, weight=1.5)
def casts(s: Sketch, x: Value) -> Value:
    """Casts there and back: exact through wider types, a rounding through narrower ones."""
    middle = s.pick(F64, F32, F16, I32, I64, BOOL, F64)
    y = s.cast(x, middle)
    if s.chance(0.3):
        y = s.cast(y, s.pick(F64, F32))
    if s.opset >= 15 and s.chance(0.2):
        return s.op("CastLike", y, x, dims=x.dims, dtype=x.dtype)
    return s.cast(y, x.dtype)


@motif(any_float)
def to_integers(s: Sketch, x: Value) -> Value:
    """Integers for the integer motifs."""
    scaled = s.op("Mul", s.op("Tanh", x, dims=x.dims), 9.0)
    return s.cast(scaled, s.pick(I32, I64, I64))


@motif(integers, weight=3.0)
def integer_arithmetic(s: Sketch, x: Value) -> Value:
    """Integer division, remainder, and sums: nothing cancels as it does for real numbers."""
    form = s.pick("divmul", "mod", "fmod", "add", "minmax", "neg", "abs", "sub", "pow")
    if form == "divmul":
        return s.op("Mul", s.op("Div", x, 3), 3)
    if form in ("mod", "fmod"):
        return s.op("Mod", x, s.pick(3, -3, 1), fmod=int(form == "fmod"))
    if form == "add":
        return s.either("Add", x, s.pick(0, 1, -2))
    if form == "minmax":
        return s.op(s.pick("Min", "Max"), x, 2)
    if form == "pow":
        return s.op("Pow", x, 2)
    if form == "sub":
        return s.op("Sub", x, s.pick(0, 4))
    return s.op(form.capitalize(), x, dims=x.dims)


@motif(integers)
def bits(s: Sketch, x: Value) -> Value:
    """Shifts and, from opset 18 on, bitwise operators on small unsigned numbers."""
    y = s.cast(s.op("Abs", x, dims=x.dims), U8)
    y = s.op("BitShift", y, s.pick(1, 2, 0), direction=s.pick("LEFT", "RIGHT"))
    if s.opset >= 18:
        kind = s.pick("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot")
        y = s.op(kind, y, dims=y.dims) if kind == "BitwiseNot" else s.op(kind, y, s.pick(0, 5, 255))
    return s.cast(y, x.dtype)


@motif(integers)
def integers_back(s: Sketch, x: Value) -> Value:
    """Integers as floats again, by a cast or by a choice."""
    if s.chance(0.4):
        test = s.op("Equal", x, s.pick(0, 2), dtype=BOOL)
        return s.op("Where", test, s.const(np.zeros((), s.numpy)), s.const(np.ones((), s.numpy)), dtype=s.dtype)
    return s.mul(s.cast(x, s.dtype), 0.125)


@motif(any_value)
def pass_through(s: Sketch, x: Value) -> Value:
    """Operators that give back what they get."""
    kind = s.pick("Identity", "Dropout", "Cast", "Concat")
    if kind == "Cast":
        return s.cast(x, x.dtype)
    if kind == "Concat" and x.rank:
        return s.op("Concat", x, dims=x.dims, axis=0)
    if kind == "Dropout" and x.is_float:
        if s.opset >= 12 and s.chance(0.4):
            ratio = s.const(np.asarray(0.4, np.float32))
            return s.op("Dropout", x, ratio, s.const(np.asarray(False)), dims=x.dims)
        if s.chance(0.4):
            return s.ops("Dropout", [x], [x.dims, x.dims], [None, BOOL])[0]
        return s.op("Dropout", x, dims=x.dims)
    return s.op("Identity", x, dims=x.dims)


def _np(x: Value) -> np.dtype:
    from onnx import helper

    return np.dtype(helper.tensor_dtype_to_np_dtype(x.dtype))

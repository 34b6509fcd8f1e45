"""What the rewriter demands of every replacement, whatever the rule: dtype, rank, sizes, kernels, numbers kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from tests.support import declared, parse, run
from xform.graph.check import check
from xform.passes import PASSES
from xform.passes.cleanup import RemoveDeadCode
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext
from xform.rewrite.pattern import op, var
from xform.rewrite.rewriter import Rewriter
from xform.rewrite.rule import Rule
from xform.target import Target


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class Stub(Rule):
    """Relu(x) becomes what `build` makes of x: whatever a careless rule may build."""

    name = "stub"
    pattern = op("Relu", var("x"))

    def __init__(self, operator: str, *inputs: object, **attributes: object) -> None:
        self._made = operator, inputs, attributes

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        operator, inputs, attributes = self._made
        return build.op(operator, match["x"], *inputs, **attributes)  # type: ignore[arg-type]


def refused(model: ir.Model, rule: Rule, target: str = "cpu") -> str:
    """The reason of the only missed remark; the graph must stay as it was, to the number of readers."""
    before = [(node.op_type, len(node.outputs[0].uses())) for node in model.graph]
    context = PassContext(Target.parse(target))
    assert not Rewriter(model, "a_pass", context).apply([rule])
    assert [(node.op_type, len(node.outputs[0].uses())) for node in model.graph] == before
    assert check(model) == []
    [remark] = context.remarks
    assert (remark.verdict, remark.rule) == ("missed", "stub")
    return remark.reason


TEXT = "g (float[N,4] x) => (float[N,4] y) { a = Abs(x)  b = Relu(a)  y = Neg(b) }"


def test_another_dtype_is_refused() -> None:
    assert "DOUBLE" in refused(parse(TEXT), Stub("Cast", to=int(ir.DataType.DOUBLE)))


def test_another_rank_is_refused() -> None:
    assert "3 axes" in refused(parse(TEXT), Stub("Mul", np.ones((1, 1, 1), np.float32)))


def test_another_number_of_elements_is_refused() -> None:
    assert "shape" in refused(parse(TEXT), Stub("Tile", [1, 2]))


def test_a_lost_broadcast_over_a_named_dim_is_refused() -> None:
    assert "[1, 4]" in refused(parse(TEXT), Stub("ReduceMax", [0], keepdims=1))


def test_other_names_of_a_size_are_allowed() -> None:
    text = "g (float[N,4] x, float[M,4] z) => (float[K,4] y) { b = Add(x, z)  c = Relu(b)  y = Neg(c) }"
    context = PassContext()
    assert Rewriter(parse(text), "a_pass", context).apply([Stub("Clip", 0.0)])
    assert context.remarks.count("applied") == 1


def test_an_operator_without_a_kernel_is_refused_on_the_cpu_only() -> None:
    text = "g (double[4] x) => (double[4] y) { b = Relu(x)  y = Neg(b) }"
    assert refused(parse(text), Stub("HardSwish")) == "ONNX Runtime has no HardSwish in DOUBLE on the CPU"
    context = PassContext(Target.parse("cuda"))
    assert Rewriter(parse(text), "a_pass", context).apply([Stub("HardSwish")])


def test_an_operator_without_a_kernel_may_replace_one_without() -> None:
    model = parse("g (bfloat16[4] x) => (bfloat16[4] y) { b = Relu(x)  y = Neg(b) }")
    assert Rewriter(model, "a_pass", PassContext()).apply([Stub("HardSwish")])


@pytest.mark.parametrize("alpha", [1 / 6, 1e-50, 1e300])
def test_attributes_that_float32_cannot_hold_are_refused_in_float64(alpha: float) -> None:
    model = parse("g (double[4] x) => (double[4] y) { b = Relu(x)  y = Neg(b) }")
    assert "alpha" in refused(model, Stub("ThresholdedRelu", alpha=alpha))


def test_attributes_that_are_exact_in_float32_are_allowed_in_float64() -> None:
    model = parse("g (double[4] x) => (double[4] y) { b = Relu(x)  y = Neg(b) }")
    assert Rewriter(model, "a_pass", PassContext()).apply([Stub("ThresholdedRelu", alpha=0.125)])


class Folds(Rule):
    """Relu(x) becomes x times a folded constant."""

    name = "stub"
    pattern = op("Relu", var("x"))

    def __init__(self, number: float, *, summand: bool) -> None:
        self.number, self.summand = number, summand

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        folded = build.folded(np.array(self.number), ir.DataType.FLOAT16, "folded", summand=self.summand)
        return build.op("Add" if self.summand else "Mul", match["x"], folded)


HALF = "g (float16[4] x) => (float16[4] y) { b = Relu(x)  y = Neg(b) }"


@pytest.mark.parametrize(("number", "summand"), [(1e5, False), (1e5, True), (1e-6, False), (np.inf, True)])
def test_folds_that_their_dtype_cannot_hold_are_refused(number: float, summand: bool) -> None:
    assert refused(parse(HALF), Folds(number, summand=summand)).startswith("the folded constant folded ")


@pytest.mark.parametrize(("number", "summand"), [(6e4, False), (1e-6, True), (0.0, False), (1e-4, False)])
def test_folds_that_only_round_are_allowed(number: float, summand: bool) -> None:
    assert Rewriter(parse(HALF), "a_pass", PassContext()).apply([Folds(number, summand=summand)])


def test_a_bare_number_that_overflows_the_dtype_of_its_operands_is_refused() -> None:
    assert refused(parse(HALF), Stub("Mul", 1e5)) == "the number 100000 overflows FLOAT16"


# Rank-raising constants, against every raising rule

ONES = (1, 1, 1)
X, W8 = "float[4,8] x", numbers(8, seed=1)
TAIL = "p = Softmax<axis = 0>(h)  y = Reshape(p, sh)"
GELU = "a = Div(x, root)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)  h = Mul(d, half)"
SPELLED: dict[str, tuple[str, Mapping[str, np.ndarray]]] = {
    "layer norm scale": ("n = LayerNormalization(x, s, b)  h = Mul(n, w)", {"s": W8, "b": W8, "w": numbers(1, 1, 8)}),
    "layer norm bias": ("n = LayerNormalization(x, s, b)  h = Add(n, w)", {"s": W8, "b": W8, "w": numbers(1, 1, 8)}),
    "rms norm scale": ("n = RMSNormalization(x, s)  h = Mul(n, w)", {"s": W8, "w": numbers(1, 1, 8)}),
    "gelu": (GELU, {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.full(ONES, 0.5, np.float32)}),
    "gelu inside": (
        GELU,
        {"root": np.float32(2**0.5), "one": np.full(ONES, 1, np.float32), "half": np.float32(0.5)},
    ),
    "hard swish": (
        "a = Add(x, three)  b = Clip(a, zero, six)  c = Mul(x, b)  h = Div(c, sixes)",
        {
            "three": np.float32(3),
            "zero": np.float32(0),
            "six": np.float32(6),
            "sixes": np.full(ONES, 6, np.float32),
        },
    ),
    "sigmoid": ("a = Neg(x)  b = Exp(a)  c = Add(b, one)  h = Reciprocal(c)", {"one": np.full(ONES, 1, np.float32)}),
    "silu": ("a = Neg(x)  b = Exp(a)  c = Add(b, one)  h = Div(x, c)", {"one": np.full(ONES, 1, np.float32)}),
    "layer norm": (
        "m = ReduceMean(x, ax)  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean(q, ax)  e = Add(v, eps)"
        "  r = Sqrt(e)  h = Div(d, r)",
        {"ax": np.array([-1]), "eps": np.full(ONES, 1e-5, np.float32)},
    ),
    "rms norm": (
        "q = Mul(x, x)  v = ReduceMean(q, ax)  e = Add(v, eps)  r = Sqrt(e)  h = Div(x, r)",
        {"ax": np.array([-1]), "eps": np.full(ONES, 1e-5, np.float32)},
    ),
}


@pytest.mark.parametrize("name", SPELLED)
def test_constants_that_raise_the_rank_keep_their_axes(name: str) -> None:
    body, constants = SPELLED[name]
    constants = {**constants, "sh": np.array([4, 8])}
    model = parse(declared(f"g ({X}) => (float[4,8] y) {{ {body}  {TAIL} }}", constants), constants)
    feeds = {"x": numbers(4, 8, seed=2)}
    expected = run(model, feeds)
    result = run_pipeline(model, resolve("exact"), verify="off")
    np.testing.assert_allclose(run(result.model, feeds)[0], expected[0], rtol=1e-5, atol=1e-6)


# float64

DOUBLE: dict[str, tuple[str, Mapping[str, np.ndarray]]] = {
    "hard swish": (
        "a = Add(x, three)  b = Clip(a, zero, six)  c = Mul(x, b)  y = Div(c, six)",
        {"three": np.float64(3), "zero": np.float64(0), "six": np.float64(6)},
    ),
    "hard sigmoid": (
        "a = Add(x, three)  b = Clip(a, zero, six)  y = Div(b, six)",
        {"three": np.float64(3), "zero": np.float64(0), "six": np.float64(6)},
    ),
    "rms norm": (
        "q = Mul(x, x)  v = ReduceMean(q, ax)  e = Add(v, eps)  r = Sqrt(e)  y = Div(x, r)",
        {"ax": np.array([-1]), "eps": np.float64(1e-3)},
    ),
    "layer norm": (
        "m = ReduceMean(x, ax)  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean(q, ax)  e = Add(v, eps)"
        "  r = Sqrt(e)  y = Div(d, r)",
        {"ax": np.array([-1]), "eps": np.float64(1e-3)},
    ),
    "pointwise map": (
        "t = Transpose<perm = [1, 0]>(x)  m = MatMul(t, w)  b = Add(m, v)  y = Transpose<perm = [1, 0]>(b)",
        {"w": numbers(4, 4, dtype="float64"), "v": numbers(4, dtype="float64")},
    ),
    "gelu nearly": (
        "s = Pow(x, three)  c = Mul(s, k)  i = Add(x, c)  j = Mul(i, slope)  t = Tanh(j)  o = Add(t, one)"
        "  p = Mul(x, o)  y = Mul(p, half)",
        {
            "three": np.float64(3),
            "k": np.float64(0.044715 * (1 + 2e-8)),
            "slope": np.float64(np.sqrt(2 / np.pi)),
            "one": np.float64(1),
            "half": np.float64(0.5),
        },
    ),
}


@pytest.mark.parametrize("name", DOUBLE)
def test_float64_stays_float64(name: str) -> None:
    body, constants = DOUBLE[name]
    model = parse(declared(f"g (double[4,8] x) => (double[4,8] y) {{ {body} }}", constants), constants)
    feeds = {"x": 3 * numbers(4, 8, seed=3, dtype="float64")}
    expected = run(model, feeds)
    result = run_pipeline(model, resolve("exact"), verify="off")
    np.testing.assert_allclose(run(result.model, feeds)[0], expected[0], rtol=1e-13, atol=1e-13)


def test_a_float64_norm_with_an_epsilon_that_float32_holds_is_raised() -> None:
    body, constants = DOUBLE["rms norm"]
    constants = {**constants, "eps": np.float64(2.0**-10)}
    model = parse(declared(f"g (double[4,8] x) => (double[4,8] y) {{ {body} }}", constants), constants)
    feeds = {"x": numbers(4, 8, seed=3, dtype="float64")}
    expected = run(model, feeds)
    PASSES["raise_rms_norm"]().run(model, PassContext())
    RemoveDeadCode().run(model, PassContext())
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]
    np.testing.assert_allclose(run(model, feeds)[0], expected[0], rtol=1e-13, atol=1e-13)


class _Reshapes(Stub):
    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.reshape(match["x"], slice(0, 1), slice(1, None))


def test_a_rule_that_asks_for_an_unknown_rank_is_a_missed_one() -> None:
    model = parse("g (float[N,4] x, int64[k] s) => (float[N,4] y) { a = Reshape(x, s)  b = Relu(a)  y = Neg(b) }")
    assert "the rank of a is not known" in refused(model, _Reshapes("Relu"))

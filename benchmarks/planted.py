"""Wrong rewrites, each with one realistic mistake: does verification find every one?

    python benchmarks/planted.py [--json]

Each plant is a graph and a pass that rewrites it wrongly. It is detected if, with verification as it is by default,
the pass is rolled back or the optimization ends with an error. The last line of `--json` carries `planted`, `detected`,
the number of `kinds`, and the names of those that got through (`missed`) or found nothing to rewrite (`idle`).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

import xform
from benchmarks.planted_edits import (
    Mistake,
    Plant,
    after,
    attribute,
    bypass,
    exchanged,
    inputs,
    instead,
    number,
    operator,
    reread,
)
from xform.errors import XformError

_F = np.float32
SCORES = "g (float[b,2,s,8] q, float[b,2,8,s] k, float[b,2,s,8] v, int64[b,s] mask) => (float[b,2,s,8] y)"
FIXED = "g (float[1,2,6,8] q, float[1,2,8,6] k, float[1,2,6,8] v, int64[1,6] mask) => (float[1,2,6,8] y)"
MASKED = """{ l = MatMul(q, k) ls = Mul(l, scale) m = Cast<to = 9>(mask) mu = Unsqueeze(m, axes)
    w = Where(mu, ls, fill) p = Softmax<axis = -1>(w) y = MatMul(p, v) }"""
COOLED = """{ l = MatMul(q, k) ls = Mul(l, scale) m = Cast<to = 9>(mask) mu = Unsqueeze(m, axes)
    w = Where(mu, ls, fill) c = Mul(w, cool) p = Softmax<axis = -1>(c) y = MatMul(p, v) }"""
ADDED = """{ l = MatMul(q, k) f = Cast<to = 1>(mask) mu = Unsqueeze(f, axes) i = Sub(one, mu) bias = Mul(i, fill)
    w = Add(l, bias) p = Softmax<axis = -1>(w) y = MatMul(p, v) }"""
CAUSAL = """g (float[b,6,6] x) => (float[b,6,6] y) { t = Trilu<upper = 0>(ones, k) c = Cast<to = 9>(t)
    w = Where(c, x, fill) y = Softmax<axis = -1>(w) }"""
NORM = """g (float[b,s,8] x) => (float[b,s,8] y) { m = ReduceMean<keepdims = 1>(x, last) d = Sub(x, m)
    q = Mul(d, d) v = ReduceMean<keepdims = 1>(q, last) e = Add(v, eps) r = Sqrt(e) n = Div(d, r)
    h = Mul(n, gamma) y = Add(h, beta) }"""
POOLED = """g (float[b,s,8] x, int64[b,s] mask) => (float[b,8] y) { f = Cast<to = 1>(mask) u = Unsqueeze(f, last)
    xm = Mul(x, u) t = ReduceSum<keepdims = 0>(xm, one) c = ReduceSum<keepdims = 0>(u, one) d = Max(c, least)
    y = Div(t, d) }"""
LINEAR = "g (float[b,8] x) => (float[b,8] y)"
BIASED = f"{LINEAR} {{ p = MatMul(x, w) a = Add(p, b) y = Sigmoid(a) }}"
WINDOW = "g (float[n,2,8,8] x) => (float[n,2,8,8] y)"
COMPARED = f"{LINEAR} {{ c = Greater(x, limit) y = Where(c, x, other) }}"
BRANCH = """g (float[4,8] x) => (float[4,8] y) { s = ReduceSum<keepdims = 0>(x) c = Greater(s, limit)
    y = If (c) <then_branch = t () => (float[4,8] a) { a = Sigmoid(x) },
                else_branch = e () => (float[4,8] b) { b = Tanh(x) }> }"""
NESTED = """g (float[4,8] x) => (float[4,8] y) { s = ReduceSum<keepdims = 0>(x) c = Greater(s, limit)
    y = If (c) <then_branch = t () => (float[4,8] a) { m = ReduceMax<keepdims = 0>(x) d = Less(m, low)
            a = If (d) <then_branch = tt () => (float[4,8] aa) { aa = Sigmoid(x) },
                        else_branch = te () => (float[4,8] ab) { ab = Relu(x) }> },
        else_branch = e () => (float[4,8] b) { b = Tanh(x) }> }"""

MASK = (("axes", np.array([1, 2])), ("scale", 0.35), ("fill", -np.inf))
FINITE = (("axes", np.array([1, 2])), ("scale", 0.35), ("fill", -1e4), ("cool", 1e-3))
ADDITIVE = (("axes", np.array([1, 2])), ("one", 1.0), ("fill", np.finfo(_F).min))
NORMS = (("last", np.array([-1])), ("eps", 1e-5), ("gamma", (8,)), ("beta", (8,)))
POOLS = (("last", np.array([-1])), ("one", np.array([1])), ("least", 1e-9))
WEIGHTS = (("w", (8, 8)), ("b", (8,)))
PLACES = tuple((f"i{n}", np.array([n])) for n in (0, 1, 4, 7, 8))
ZERO, LAST = np.array([0]), np.array([-1])

_ATTENTION: tuple[Plant, ...] = (
    Plant("softmax over the queries", "axis", f"{SCORES} {MASKED}", attribute("Softmax", axis=-2), MASK),
    Plant("softmax over the heads", "axis", f"{FIXED} {MASKED}", attribute("Softmax", axis=1), MASK),
    Plant("fill -inf becomes -10", "mask fill", f"{SCORES} {MASKED}", number("fill", lambda _: -10.0), MASK),
    Plant("finite fill becomes -inf", "mask fill", f"{SCORES} {COOLED}", number("fill", lambda _: -np.inf), FINITE),
    Plant("finite fill becomes half", "mask fill", f"{FIXED} {COOLED}", number("fill", lambda a: a / 2), FINITE),
    Plant(
        "lowest fill becomes -inf", "empty row", f"{SCORES} {ADDED}",
        after("w", "c = Less(x, low) y = Where(c, inf, x)", low=_F(-1e30), inf=_F(-np.inf)), ADDITIVE,
    ),
    Plant("mask inverted", "mask", f"{SCORES} {MASKED}", inputs("Where", 0, 2, 1), MASK),
    Plant("mask forgotten, one sample", "mask", f"{FIXED} {MASKED}", bypass("Where", 1), MASK),
    Plant("added mask forgotten", "mask", f"{FIXED} {ADDED}", bypass("Add", 0), ADDITIVE),
    Plant(
        "mask of the first sample for all", "mask", f"{SCORES} {MASKED}",
        after("mu", "y = Gather<axis = 0>(x, zero)", zero=ZERO), MASK,
    ),
    Plant(
        "holes of the mask filled", "mask", f"{SCORES} {MASKED}",
        after("mask", "i = CumSum<reverse = 1>(x, one) g = Greater(i, zero) y = Cast<to = 7>(g)",
              one=np.array(1), zero=np.array(0)), MASK,
    ),
    Plant(
        "an empty row sees nothing", "empty row", f"{SCORES} {ADDED}",
        after("p", "s = ReduceMax<keepdims = 1>(mu, last) y = Mul(x, s)", last=LAST), ADDITIVE,
    ),
    Plant("scale of the logits missing", "scale", f"{SCORES} {MASKED}", bypass("Mul"), MASK),
    Plant("scale applied twice", "scale", f"{SCORES} {MASKED}", number("scale", np.square), MASK),
    Plant(
        "scale missing for odd lengths", "scale", f"{SCORES} {MASKED}",
        after("ls", "h = Shape<start = 2, end = 3>(x) m = Mod(h, two) o = Cast<to = 9>(m) y = Where(o, l, x)",
              two=np.array([2])), MASK,
    ),
    Plant(
        "causal mask off by one", "border", CAUSAL, number("k", lambda a: a + 1),
        (("ones", np.ones((6, 6))), ("k", np.array(0)), ("fill", -np.inf)),
    ),
    Plant("pads counted in the mean", "mask", POOLED, bypass("Mul"), POOLS),
    Plant("division by an empty mask", "empty row", POOLED, bypass("Max"), POOLS),
)  # fmt: skip

_NORMS: tuple[Plant, ...] = (
    Plant("epsilon ten times as large", "epsilon", NORM, number("eps", lambda a: 10 * a), NORMS),
    Plant("epsilon outside of the root", "epsilon", NORM, after("r", "a = Sqrt(v) y = Add(a, eps)"), NORMS),
    Plant("epsilon dropped", "zero row", NORM, number("eps", np.zeros_like), NORMS),
    Plant("unbiased variance", "statistics", NORM, after("v", "y = Mul(x, f)", f=_F(8 / 7)), NORMS),
    Plant("mean not subtracted", "statistics", NORM, reread("Div", 0, "x"), NORMS),
    Plant("normalized over two axes", "axis", NORM, number("last", lambda _: [-2, -1]), NORMS),
)

_PRODUCTS: tuple[Plant, ...] = (
    Plant("bias dropped", "bias", BIASED, bypass("Add"), WEIGHTS),
    Plant("bias added twice", "bias", BIASED, after("p", "y = Add(x, b)"), WEIGHTS),
    Plant("weight transposed", "perm", BIASED, number("w", np.transpose), WEIGHTS),
    Plant(
        "bias along the rows", "broadcast", BIASED.replace("[b,8]", "[8,8]"),
        number("b", lambda a: a.reshape(8, 1)), WEIGHTS,
    ),
    Plant(
        "products accumulated in float16", "dtype", BIASED,
        after("p", "h = Cast<to = 10>(x) y = Cast<to = 1>(h)"), WEIGHTS,
    ),
    Plant("weight folded in float16", "dtype", BIASED, number("w", lambda a: a.astype(np.float16)), WEIGHTS),
    Plant(
        "residual dropped", "residual", f"{LINEAR} {{ p = MatMul(x, w) a = Add(p, x) y = Tanh(a) }}",
        bypass("Add"), WEIGHTS[:1],
    ),
    Plant(
        "residual of another value", "residual", f"{LINEAR} {{ r = Relu(x) p = MatMul(r, w) y = Add(p, x) }}",
        reread("Add", 1, "r"), WEIGHTS[:1],
    ),
    Plant(
        "two inputs taken for one", "aliasing",
        "g (float[b,8] x, float[b,8] z) => (float[b,8] y) { a = Sigmoid(z) y = Mul(x, a) }", reread("Sigmoid", 0, "x"),
    ),
    Plant(
        "wrong reader of two", "aliasing", f"{LINEAR} {{ a = Relu(x) c = Neg(a) d = Exp(c) y = Add(a, d) }}",
        reread("Exp", 0, "a"),
    ),
)  # fmt: skip

_MOVES: tuple[Plant, ...] = (
    Plant(
        "transposed the other way", "perm",
        "g (float[b,6,6,8] x) => (float[b,6,6,8] y) { y = Transpose<perm = [0, 2, 1, 3]>(x) }",
        attribute("Transpose", perm=[0, 1, 2, 3]),
    ),
    Plant(
        "concatenated in the other order", "concat",
        f"{LINEAR} {{ a = Slice(x, i0, i4, i1) c = Slice(x, i4, i8, i1) y = Concat<axis = 1>(a, c) }}",
        inputs("Concat", 1, 0), PLACES,
    ),
    Plant(
        "slice one too early", "border", "g (float[b,8] x) => (float[b,7] y) { y = Slice(x, i1, i8, i1) }",
        instead("Slice", "y = Slice(x0, from, to, x3)", **{"from": ZERO, "to": np.array([7])}), PLACES,
    ),
    Plant(
        "gathered one beside", "index", "g (float[b,8] x) => (float[b,3] y) { y = Gather<axis = 1>(x, at) }",
        number("at", lambda a: a + 1), (("at", np.array([0, 2, 5])),),
    ),
    Plant(
        "first taken for the last", "index", "g (float[b,8] x) => (float[b,1] y) { y = Gather<axis = 1>(x, at) }",
        number("at", np.zeros_like), (("at", LAST),),
    ),
    Plant(
        "rank lost before a broadcast", "rank",
        "g (float[4,4,4] x, float[4,4] z) => (float[4,4,4] y) { u = Unsqueeze(z, one) y = Add(x, u) }",
        bypass("Unsqueeze"), (("one", np.array([1])),),
    ),
    Plant(
        "dims not kept", "keepdims",
        "g (float[8,8] x) => (float[8,8] y) { m = ReduceMean<keepdims = 1>(x, one) y = Sub(x, m) }",
        attribute("ReduceMean", keepdims=0), (("one", np.array([1])),),
    ),
    Plant(
        "reduced over the wrong axis", "reduction",
        "g (float[6,6,6] x) => (float[6,6] y) { y = ReduceMax<keepdims = 0>(x, at) }",
        number("at", lambda a: a - 1), (("at", np.array([2])),),
    ),
    Plant(
        "batch frozen to two", "dynamic", "g (float[b,2,4] x) => (float[b,8] y) { y = Reshape(x, to) }",
        number("to", lambda _: [2, 8]), (("to", np.array([0, -1])),),
    ),
    Plant(
        "small part beside a large one", "small part",
        "g (float[4,8] x) => (float[4,16] y) { l = Mul(x, k) p = Softmax<axis = -1>(x) y = Concat<axis = 1>(l, p) }",
        after("p", "y = Mul(x, f)", f=_F(1.01)), (("k", 3e4),),
    ),
)  # fmt: skip

_WINDOWS: tuple[Plant, ...] = (
    Plant(
        "reflected padding becomes edge", "border",
        'g (float[b,2,8] x) => (float[b,2,12] y) { y = Pad<mode = "reflect">(x, at) }',
        attribute("Pad", mode="edge"), (("at", np.array([0, 0, 2, 0, 0, 2])),),
    ),
    Plant(
        "window shifted by one", "border",
        "g (float[n,3,16,16] x) => (float[n,4,16,16] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w) }",
        attribute("Conv", pads=[0, 0, 2, 2]), (("w", (4, 3, 3, 3)),),
    ),
    Plant(
        "zeros around a maximum", "border",
        f"{WINDOW} {{ y = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x) }}",
        instead("MaxPool", "p = Pad(x0, at) y = MaxPool<kernel_shape = [3, 3]>(p)",
                at=np.array([0, 0, 1, 1, 0, 0, 1, 1])),
    ),
    Plant(
        "pads counted in an average", "border",
        f"{WINDOW} {{ y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x) }}",
        attribute("AveragePool", count_include_pad=1),
    ),
    Plant(
        "resized from another origin", "border",
        """g (float[n,2,4,4] x) => (float[n,2,8,8] y) {
            y = Resize<mode = "linear", coordinate_transformation_mode = "half_pixel">(x, , sc) }""",
        attribute("Resize", coordinate_transformation_mode="asymmetric"), (("sc", np.array([1.0, 1, 2, 2])),),
    ),
)  # fmt: skip

_FUNCTIONS: tuple[Plant, ...] = (
    Plant(
        "tanh GELU for erf GELU", "function", f'{LINEAR} {{ y = Gelu<approximate = "none">(x) }}',
        attribute("Gelu", approximate="tanh"),
    ),
    Plant(
        "upper limit of a clip", "limits", f"{LINEAR} {{ y = Clip(x, low, high) }}",
        number("high", lambda a: a - 0.01), (("low", 0.0), ("high", 6.0)),
    ),
    Plant(
        "upper limit forgotten", "limits", f"{LINEAR} {{ y = Clip(x, low, high) }}",
        number("high", lambda a: a + 1e6), (("low", 0.0), ("high", 6.0)),
    ),
    Plant(
        "halves rounded up", "rounding", f"{LINEAR} {{ y = Round(x) }}",
        instead("Round", "a = Add(x0, half) y = Floor(a)", half=_F(0.5)),
    ),
    Plant(
        "cut off instead of rounded down", "negative", f"{LINEAR} {{ y = Floor(x) }}",
        instead("Floor", "a = Cast<to = 7>(x0) y = Cast<to = 1>(a)"),
    ),
    Plant(
        "another slope below zero", "negative", f"{LINEAR} {{ y = LeakyRelu<alpha = 0.1>(x) }}",
        attribute("LeakyRelu", alpha=0.01),
    ),
    Plant(
        "saturated beyond fifty", "large", f"{LINEAR} {{ y = Softsign(x) }}",
        after("x", "y = Clip(x, lo, hi)", lo=_F(-50), hi=_F(50)),
    ),
    Plant(
        "tiny values flushed to zero", "tiny", f"{LINEAR} {{ n = LpNormalization<axis = 1, p = 2>(x) y = Tanh(n) }}",
        after("x", "a = Abs(x) c = Less(a, lo) y = Where(c, nil, x)", lo=_F(3e-4), nil=_F(0)),
    ),
    Plant(
        "softmax without the maximum", "large", f"{LINEAR} {{ y = Softmax<axis = -1>(x) }}",
        instead("Softmax", "e = Exp(x0) s = ReduceSum(e, last) y = Div(e, s)", last=LAST),
    ),
    Plant(
        "logarithm of a softmax", "large", f"{LINEAR} {{ y = LogSoftmax<axis = -1>(x) }}",
        instead("LogSoftmax", "s = Softmax<axis = -1>(x0) y = Log(s)"),
    ),
    Plant(
        "zero counts as positive", "boundary", COMPARED, operator("Greater", "GreaterOrEqual"),
        (("limit", 0.0), ("other", 7.0)),
    ),
    Plant(
        "threshold included", "boundary", COMPARED, operator("Greater", "GreaterOrEqual"),
        (("limit", 1.23), ("other", 7.0)),
    ),
    Plant(
        "last of equal maxima", "ties", "g (float[b,8] x) => (int64[b,1] y) { y = ArgMax<axis = 1>(x) }",
        attribute("ArgMax", select_last_index=1),
    ),
    Plant(
        "sign of a remainder", "negative", "g (int64[b,8] x) => (int64[b,8] y) { y = Mod(x, three) }",
        attribute("Mod", fmod=1), (("three", np.array(3)),),
    ),
    Plant(
        "wrong for one sample only", "batch of one", f"{LINEAR} {{ y = Tanh(x) }}",
        after("y", "n = Shape<end = 1>(x) c = Equal(n, one) h = Neg(x) y = Where(c, h, x)", one=np.array([1])),
    ),
)  # fmt: skip

_BRANCHES: tuple[Plant, ...] = (
    Plant("then and else exchanged", "branch", BRANCH, exchanged, (("limit", 500.0),)),
    Plant("wrong in the branch not taken", "branch", BRANCH, operator("Sigmoid", "Tanh"), (("limit", 500.0),)),
    Plant("wrong in the other branch", "branch", BRANCH, operator("Tanh", "Sigmoid"), (("limit", -500.0),)),
    Plant("wrong where no number leads", "branch", BRANCH, operator("Sigmoid", "Tanh"), (("limit", np.inf),)),
    Plant("wrong in a nested branch", "branch", NESTED, operator("Relu", "Sigmoid"), (("limit", 500.0), ("low", 60.0))),
)

PLANTS: tuple[Plant, ...] = (*_ATTENTION, *_NORMS, *_PRODUCTS, *_MOVES, *_WINDOWS, *_FUNCTIONS, *_BRANCHES)


def verdict(plant: Plant, seed: int = 0) -> str:
    """What became of a plant: "detected", "missed", or "idle" where it found nothing to rewrite."""
    mistake = Mistake(plant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = xform.optimize(plant.graph(seed), passes=[mistake]).report
        except XformError:
            return "detected" if any(mistake.happened) else "idle"
    if not any(mistake.happened):
        return "idle"
    return "detected" if any(one.status == "rolled_back" for one in report.passes) else "missed"


def run_planted(seed: int = 0, plants: Sequence[Plant] = PLANTS) -> tuple[int, int]:
    """Plants that made their mistake, and how many of them were detected."""
    found = [verdict(plant, seed) for plant in plants]
    return len(found) - found.count("idle"), found.count("detected")


def main() -> int:
    """Run every plant and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args()
    found: dict[str, list[str]] = {"detected": [], "missed": [], "idle": []}
    for plant in PLANTS:
        outcome = verdict(plant, arguments.seed)
        found[outcome].append(plant.name)
        print(f"{outcome:9} {plant.kind}: {plant.name}", file=sys.stderr)
    summary: dict[str, Any] = {
        "planted": len(PLANTS) - len(found["idle"]),
        "detected": len(found["detected"]),
        "kinds": len({plant.kind for plant in PLANTS}),
        "missed": found["missed"],
        "idle": found["idle"],
    }
    if arguments.json:
        print(json.dumps(summary))
    return 0 if not found["missed"] and not found["idle"] else 1


if __name__ == "__main__":
    sys.exit(main())

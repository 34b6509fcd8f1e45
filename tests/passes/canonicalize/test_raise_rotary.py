"""raise_rotary: both forms, in every spelling of the rotation, constant and computed caches, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from support import applied, apply, floats, missed, ops, parse, rewritten, run

from xform.passes.canonicalize.raise_rotary import RaiseRotary

X = {"x": floats(2, 3, 5, 8)}
ANGLES = floats(5, 4)
INTS = {
    "zero": 0,
    "four": 4,
    "eight": 8,
    "one": 1,
    "two": 2,
    "last": -1,
}
HALF = {
    "slices": "lo = Slice(x, zero, four, last)  hi = Slice(x, four, eight, last)  n = Neg(hi)"
    "  r = Concat <axis = -1> (n, lo)",
    "split": "lo, hi = Split <axis = -1, num_outputs = 2> (x)  n = Neg(hi)  r = Concat <axis = 3> (n, lo)",
}
PAIRS = {
    "strides": "ev = Slice(x, zero, eight, last, two)  od = Slice(x, one, eight, last, two)  n = Neg(od)"
    "  a = Unsqueeze(n, last)  b = Unsqueeze(ev, last)  c = Concat <axis = -1> (a, b)  r = Reshape(c, flat)",
}
EXTRA = {"flat": np.array([0, 0, 0, 8], np.int64), **{k: np.array([v], np.int64) for k, v in INTS.items()}}


def graph(rotation: str, caches: str = "", inputs: str = "float[1,1,5,8] cos, float[1,1,5,8] sin") -> str:
    names = "".join(f", int64[1] {k}" for k in INTS)
    return f"""g (float[2,3,5,8] x, {inputs}, int64[4] flat{names}) => (float[2,3,5,8] out)
    {{ {caches} {rotation}  p = Mul(x, cos)  q = Mul(r, sin)  out = Add(p, q) }}"""


def caches(angles: np.ndarray, half: bool) -> dict[str, np.ndarray]:
    full = np.concatenate([angles, angles], -1) if half else np.repeat(angles, 2, -1)
    return {"cos": np.cos(full)[None, None], "sin": np.sin(full)[None, None]}


@pytest.mark.parametrize("rotation", HALF)
def test_half_split_with_constant_caches(rotation: str) -> None:
    model, remarks = rewritten(graph(HALF[rotation]), EXTRA | caches(ANGLES, True), X, RaiseRotary())
    assert applied(remarks, "rotary") == 1 and ops(model).count("RotaryEmbedding") == 1
    assert model.graph[-1].attributes["interleaved"].value == 0


@pytest.mark.parametrize("rotation", PAIRS)
def test_interleaved_with_constant_caches(rotation: str) -> None:
    model, remarks = rewritten(graph(PAIRS[rotation]), EXTRA | caches(ANGLES, False), X, RaiseRotary())
    assert applied(remarks, "rotary") == 1
    assert model.graph[-1].attributes["interleaved"].value == 1


def test_half_split_with_computed_caches() -> None:
    computed = """f = Concat <axis = -1> (t, t)  c3 = Cos(f)  s3 = Sin(f)  cos = Unsqueeze(c3, one)
    sin = Unsqueeze(s3, one) """
    text = graph(HALF["slices"], computed, "float[2,5,4] t")
    model, _ = rewritten(text, EXTRA, X | {"t": floats(2, 5, 4)}, RaiseRotary())
    assert ops(model).count("RotaryEmbedding") == 1 and "Expand" not in ops(model)


def test_caches_that_do_not_repeat_are_left_and_told() -> None:
    wrong = {"cos": floats(1, 1, 5, 8), "sin": floats(1, 1, 5, 8)}
    model, remarks = rewritten(graph(HALF["slices"]), EXTRA | wrong, X, RaiseRotary())
    assert "RotaryEmbedding" not in ops(model) and any("not provably equal" in m for m in missed(remarks))


def test_the_wrong_sign_or_order_is_no_rotation() -> None:
    for rotation in (
        "lo, hi = Split <axis = -1, num_outputs = 2> (x)  n = Neg(lo)  r = Concat <axis = 3> (hi, n)",
        "lo, hi = Split <axis = -1, num_outputs = 2> (x)  r = Concat <axis = 3> (hi, lo)",
    ):
        model, remarks = rewritten(graph(rotation), EXTRA | caches(ANGLES, True), X, RaiseRotary())
        assert "RotaryEmbedding" not in ops(model) and len(remarks) == 0


def test_caches_shared_by_the_batch_are_expanded() -> None:
    text = """g (float[B,3,5,8] x, float[1,5,4] cos, float[1,5,4] sin) => (float[B,3,5,8] out)
    { out = RotaryEmbedding (x, cos, sin) }"""
    constants = {"cos": np.cos(ANGLES)[None], "sin": np.sin(ANGLES)[None]}
    model = parse(text, constants)
    remarks = apply(model, RaiseRotary())
    assert applied(remarks, "batch") == 1 and ops(model).count("Expand") == 2
    found = run(model, X)[0]
    low, high = np.split(X["x"], 2, -1)
    cos, sin = np.cos(ANGLES), np.sin(ANGLES)
    np.testing.assert_allclose(found, np.concatenate([low * cos - high * sin, low * sin + high * cos], -1), atol=1e-5)

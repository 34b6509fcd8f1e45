"""Rule 8 of simplify_layout: a Transpose between views that flatten and restore a batch."""

from __future__ import annotations

import numpy as np
import pytest
from support import applied, declared, floats, ops, rewritten

from xform.passes.cleanup import SimplifyLayout

RULE = "transpose_between_views"


def simplify(x: tuple[int, ...], inner: list[int], perm: list[int], outer: list[int], declared_x: str | None = None):
    constants = {"t": np.array(inner), "u": np.array(outer)}
    shape = declared_x or ",".join(map(str, x))
    text = f"""g (float[{shape}] x) => ({"float[" + ",".join("?" * len(outer)) + "]"} y) {{
        r = Reshape(x, t)
        s = Transpose<perm={perm}>(r)
        y = Reshape(s, u) }}"""
    return rewritten(declared(text, constants), constants, {"x": floats(*x)}, SimplifyLayout())


@pytest.mark.parametrize(
    ("x", "inner", "perm", "outer", "left"),
    [
        ((2, 3, 4, 5), [6, 4, 5], [0, 2, 1], [2, 3, 5, 4], ["Transpose"]),  # a batch flattened and restored
        ((1, 3, 4, 5), [3, 4, 5], [0, 2, 1], [1, 3, 5, 4], ["Transpose"]),
        ((1, 2, 3, 4, 5), [6, 4, 5], [0, 2, 1], [1, 6, 5, 4], ["Reshape", "Transpose"]),  # repeated heads
        ((6, 4), [6, 2, 2], [2, 1, 0], [2, 2, 2, 3], ["Reshape", "Transpose"]),
        ((2, 3), [3, 2], [1, 0], [2, 3, 1], ["Reshape", "Transpose"]),
    ],
)
def test_outer_view_only_divides(
    x: tuple[int, ...], inner: list[int], perm: list[int], outer: list[int], left: list[str]
) -> None:
    model, remarks = simplify(x, inner, perm, outer)
    assert applied(remarks, RULE) == 1
    assert ops(model) == left


@pytest.mark.parametrize(
    ("x", "inner", "perm", "outer"),
    [
        ((2, 3, 4), [6, 4], [1, 0], [8, 3]),  # joins parts of both axes
        ((2, 3, 4), [2, 12], [1, 0], [24]),  # joins axes
        ((6, 4), [3, 2, 4], [0, 2, 1], [12, 2]),  # joins one, keeps one
    ],
)
def test_outer_view_that_joins_stays(x: tuple[int, ...], inner: list[int], perm: list[int], outer: list[int]) -> None:
    model, remarks = simplify(x, inner, perm, outer)
    assert applied(remarks, RULE) == 0
    assert ops(model) == ["Reshape", "Transpose", "Reshape"]


def test_a_symbol_is_carried_along() -> None:
    model, remarks = simplify((2, 3, 4, 5), [6, -1, 5], [0, 2, 1], [2, 3, 5, -1], "2,3,s,5")
    assert applied(remarks, RULE) == 1
    assert ops(model) == ["Transpose"]


def test_a_transpose_that_others_read_stays() -> None:
    constants = {"t": np.array([6, 4, 5]), "u": np.array([2, 3, 5, 4])}
    text = """g (float[2,3,4,5] x) => (float[2,3,5,4] y, float[6,5,4] z) {
        r = Reshape(x, t)
        s = Transpose<perm=[0,2,1]>(r)
        y = Reshape(s, u)
        z = Neg(s) }"""
    _, remarks = rewritten(declared(text, constants), constants, {"x": floats(2, 3, 4, 5)}, SimplifyLayout())
    assert applied(remarks, RULE) == 0

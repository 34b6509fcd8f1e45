from __future__ import annotations

import numpy as np
import pytest
from support import applied, declared, floats, missed, ops, rewritten

from xform.passes.fuse import PackProducts

K = 6
WEIGHTS = {
    "w1": floats(K, 4), "w2": floats(K, 8), "w3": floats(K, 4), "b1": floats(4), "b2": floats(1, 8), "b3": floats(4),
    "wide": floats(2, 3, 4), "v": floats(2, K),
}  # fmt: skip
X = {"x": floats(2, 3, K)}


def pack(body: str, outputs: str, rows: int = 6, feeds: dict[str, np.ndarray] = X, **more: np.ndarray):
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {k: v for k, v in {**WEIGHTS, **more}.items() if k in words}
    text = declared(f"g (float[2,3,6] x) => ({outputs}) {{ {body} }}", used)
    return rewritten(text, used, feeds, PackProducts(rows), atol=1e-4)


def test_gate_and_values() -> None:
    body = "g0 = MatMul(x, w1) s = Sigmoid(g0) g1 = Mul(g0, s) u = MatMul(x, w3) y = Mul(g1, u)"
    model, remarks = pack(body, "float[2,3,4] y")
    assert applied(remarks, "pack") == 1
    assert ops(model) == ["MatMul", "Split", "Sigmoid", "Mul", "Mul"]


@pytest.mark.parametrize("add", ["Add(m{i}, b{i})", "Add(b{i}, m{i})"])
def test_grouped_heads_with_biases_of_every_form(add: str) -> None:
    sums = [add.format(i=i) for i in (1, 2, 3)]
    body = " ".join(f"m{i} = MatMul(x, w{i}) y{i} = {total}" for i, total in enumerate(sums, 1))
    model, _ = pack(body, "float[2,3,4] y1, float[2,3,8] y2, float[2,3,4] y3")
    assert ops(model) == ["MatMul", "Add", "Split"]
    assert [o.name for o in model.graph.outputs] == ["y1", "y2", "y3"]


@pytest.mark.parametrize(
    ("body", "outputs", "operators"),
    [
        # one has no bias; one bias is no vector over the columns; one product is an output: biases stay
        ("m = MatMul(x, w1) y = Add(m, b1) z = MatMul(x, w2)", "float[2,3,4] y, float[2,3,8] z",
         ["MatMul", "Split", "Add"]),
        ("m = MatMul(x, w1) y = Add(m, wide) n = MatMul(x, w2) z = Add(n, b2)", "float[2,3,4] y, float[2,3,8] z",
         ["MatMul", "Split", "Add", "Add"]),
        ("m = MatMul(x, w1) y = Add(m, b1) n = MatMul(x, w3) z = Add(n, b3)",
         "float[2,3,4] y, float[2,3,4] z, float[2,3,4] n", ["MatMul", "Split", "Add", "Add"]),
    ],
)  # fmt: skip
def test_biases_that_stay(body: str, outputs: str, operators: list[str]) -> None:
    model, _ = pack(body, outputs)
    assert ops(model) == operators


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul(x, w1) z = Neg(x)",  # a single product
        "y = MatMul(x, w1) z = MatMul(v, x)",  # not the left operand
    ],
)
def test_left_alone(body: str) -> None:
    model, remarks = pack(body, "float[2,3,4] y, float[2,?,6] z", v=floats(2, 5, 3))
    assert applied(remarks, "pack") == 0 and "Split" not in ops(model)
    assert not missed(remarks)


def test_a_shared_weight_is_not_kept_twice() -> None:
    body = "y = MatMul(x, w1) n = Neg(x) z = MatMul(n, w1) q = MatMul(x, w2)"
    _, remarks = pack(body, "float[2,3,4] y, float[2,3,4] z, float[2,3,8] q")
    assert applied(remarks, "pack") == 0
    assert "kept twice" in missed(remarks)[0]


def test_it_does_not_pay_and_says_so() -> None:
    _, remarks = pack("y = MatMul(x, w1) z = MatMul(x, w2)", "float[2,3,4] y, float[2,3,8] z", rows=5)
    assert applied(remarks, "pack") == 0
    assert missed(remarks)[0].endswith("above 5 rows; these have 6")


def test_by_default_it_pays_nowhere() -> None:
    _, remarks = pack("y = MatMul(x, w1) z = MatMul(x, w2)", "float[2,3,4] y, float[2,3,8] z", rows=0)
    assert PackProducts().largest_rows == 0
    assert missed(remarks)[0].endswith("for any number of rows")


def test_an_unknown_number_of_rows_does_not_pay() -> None:
    used = {k: WEIGHTS[k] for k in ("w1", "w2")}
    text = "g (float[n,3,6] x) => (float[n,3,4] y, float[n,3,8] z) { y = MatMul(x, w1) z = MatMul(x, w2) }"
    _, remarks = rewritten(declared(text, used), used, X, PackProducts(100))
    assert "unknown number" in missed(remarks)[0]

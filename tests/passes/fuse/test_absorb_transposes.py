from __future__ import annotations

import numpy as np
import pytest
from support import applied, declared, floats, missed, ops, rewritten

from xform.passes.cleanup import SimplifyLayout
from xform.passes.fuse import AbsorbTransposes

B, H, M, K, N = 2, 3, 5, 4, 6
T = "Transpose<perm=[0,1,3,2]>"
CONSTANTS = {
    "row": floats(N), "column": floats(M, 1), "full": floats(1, H, M, N), "number": np.float32(1.5),
    "one": np.float32(1), "pads": np.array([0, 0, 0, 0, 0, 0, 1, 0]), "sizes": np.array([2, 3]),
    "start": np.array([1]), "stop": np.array([4]), "axis": np.array([-1]), "flat": np.array([B, -1]),
}  # fmt: skip
FEEDS = {"a": floats(B, H, M, K), "b": floats(B, H, K, N)}


def absorb(body: str, outputs: str, feeds: dict[str, np.ndarray] = FEEDS, dims: tuple[str, ...] = ()):
    used = {
        k: v for k, v in CONSTANTS.items() if k in body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    given = ", ".join(f"float[{','.join(map(str, v.shape))}] {k}" for k, v in feeds.items())
    for old, new in zip(dims[::2], dims[1::2], strict=True):
        given = given.replace(old, new)
    text = declared(f"g ({given}) => ({outputs}) {{ {body} }}", used)
    return rewritten(text, used, feeds, AbsorbTransposes(), rtol=1e-4, atol=1e-5)


TIED = ["p", "Relu(p)", "Mul(p, row)", "Sub(column, p)", "Add(p, full)", "Div(number, p)", "Mul(p, p)"]


@pytest.mark.parametrize("tied", TIED)
def test_transposed_product_through_elementwise(tied: str) -> None:
    tied = f"e = {tied}" if "(" in tied else "e = Neg(p)"
    model, remarks = absorb(f"p = MatMul(a, b) {tied} y = {T}(e)", f"float[{B},{H},{N},{M}] y")
    assert applied(remarks, "flip_region") == 1
    assert ops(model).count("Transpose") == 2 and ops(model).index("MatMul") == 2  # both before the product, absorbed
    assert model.graph.outputs[0].name == "y"


def test_two_transposes_around_a_region_vanish() -> None:
    body = f"t = {T}(a) r = Relu(t) s = Sigmoid(r) y = {T}(s)"
    model, _ = absorb(body, f"float[{B},{H},{M},{K}] y", {"a": FEEDS["a"]})
    assert ops(model) == ["Relu", "Sigmoid"]


@pytest.mark.parametrize(
    "region",
    [
        "s1, s2 = Split<axis=2>(t, sizes) y1 = Neg(s1) y2 = Abs(s2) c = Concat<axis=-2>(y1, y2)",
        "s1, s2 = Split<axis=-1, num_outputs=2>(t) c = Concat<axis=3>(s2, s1)",
        "s = Slice(t, start, stop, axis) c = Concat<axis=2>(s, s)",
        "c = Pad<mode=\"constant\">(t, pads, one)",
    ],
)  # fmt: skip
def test_operators_with_axes(region: str) -> None:
    feeds = {"a": floats(B, H, 4, 5)}  # transposed to [.., 5, 4]
    body = f"t = {T}(a) {region} r = Relu(c) y = {T}(r)"
    model, remarks = absorb(body, f"float[{B},{H},?,?] y", feeds)
    assert applied(remarks, "flip_region") == 1
    assert "Transpose" not in ops(model)


def test_linear_attention_by_columns() -> None:
    """Heads by columns [B, H, 3 D, N] to rows, relu(q) (relu(k)^T [v, 1]), normalized, and back to columns."""
    size, count = 4, 6
    constants = {
        "three": np.array([size] * 3), "two": np.array([size, 1]), "pads": np.array([0] * 7 + [1]),
        "one": np.float32(1), "eps": np.float32(1e-3), "flat": np.array([B, H * size, count]),
    }  # fmt: skip
    text = f"""g (float[{B},{H},{3 * size},{count}] x) => (float[{B},{H * size},{count}] y) {{
        t = {T}(x)
        q, k, v = Split<axis=3>(t, three)
        qr = Relu(q)  kr = Relu(k)
        vp = Pad<mode="constant">(v, pads, one)
        kt = {T}(kr)
        kv = MatMul(kt, vp)
        o = MatMul(qr, kv)
        n, d = Split<axis=-1>(o, two)
        de = Add(d, eps)
        z = Div(n, de)
        zt = {T}(z)
        y = Reshape(zt, flat) }}"""
    feeds = {"x": floats(B, H, 3 * size, count)}
    passes = (AbsorbTransposes(), SimplifyLayout())
    model, remarks = rewritten(declared(text, constants), constants, feeds, *passes, rtol=1e-4, atol=1e-5)
    assert applied(remarks, "flip_region") == 2
    readers = [u for n in model.graph if n.op_type == "Transpose" for u, _ in n.outputs[0].uses()]
    assert {u.op_type for u in readers} == {"MatMul"}  # runtimes read those by columns


@pytest.mark.parametrize(
    "body",
    [
        f"p = MatMul(a, b) s = Softmax<axis=-1>(p) y = {T}(s)",  # sums along one axis
        f"r = Relu(a) y = {T}(r)",  # it would be transposed before instead of after
        f"y = {T}(a)",
    ],
)
def test_left_alone(body: str) -> None:
    feeds = FEEDS if "b)" in body else {"a": FEEDS["a"]}
    model, remarks = absorb(body, f"float[{B},{H},?,?] y", feeds)
    assert applied(remarks, "flip_region") == 0
    assert ops(model).count("Transpose") == 1


def test_a_region_that_is_read_both_ways_says_why_it_stays() -> None:
    body = f"p = MatMul(a, b) r = Relu(p) y = {T}(r) z = Reshape(r, flat)"
    _, remarks = absorb(body, f"float[{B},{H},{N},{M}] y, float[{B},?] z")
    assert applied(remarks, "flip_region") == 0
    assert "it moves 180 now" in missed(remarks)[0]


def test_a_product_with_a_constant_weight_keeps_its_rows() -> None:
    used = {"w": floats(K, N)}
    text = f"g (float[{B},{H},{M},{K}] a) => (float[{B},{H},{N},{M}] y) {{ p = MatMul(a, w) r = Relu(p) y = {T}(r) }}"
    _, remarks = rewritten(declared(text, used), used, {"a": FEEDS["a"]}, AbsorbTransposes())
    assert applied(remarks, "flip_region") == 0


def test_a_graph_output_inside_is_given_as_it_was() -> None:
    body = f"t = {T}(a) r = Relu(t) s = Neg(r) y = {T}(s) u = {T}(r) w = Abs(u) z = {T}(w)"
    outputs = f"float[{B},{H},{M},{K}] y, float[{B},{H},{K},{M}] r, float[{B},{H},{K},{M}] z"
    model, _ = absorb(body, outputs, {"a": FEEDS["a"]})
    assert [o.name for o in model.graph.outputs] == ["y", "r", "z"]


def test_symbolic_sizes() -> None:
    body = f"t = {T}(a) r = Relu(t) y = {T}(r)"
    model, _ = absorb(body, "float[b,3,m,4] y", {"a": FEEDS["a"]}, (f"{B},{H},{M}", f"b,{H},m"))
    assert ops(model) == ["Relu"]


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_other_ranks(rank: int) -> None:
    shape, perm = (2,) * (rank - 2) + (3, 4), [*range(rank - 2), rank - 1, rank - 2]
    text = f"""g (float[{",".join(map(str, shape))}] x) => (float[{",".join(map(str, shape))}] y) {{
        t = Transpose<perm={perm}>(x) r = Relu(t) y = Transpose<perm={perm}>(r) }}"""
    model, _ = rewritten(text, {}, {"x": floats(*shape)}, AbsorbTransposes())
    assert ops(model) == ["Relu"]

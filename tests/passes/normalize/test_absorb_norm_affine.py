from __future__ import annotations

import numpy as np
import pytest
from support import applied, declared, floats, missed, ops, rewritten

from xform.graph.norms import IDENTITY_AFFINE
from xform.graph.values import constant
from xform.passes.normalize import AbsorbNormAffine

D = 6
WEIGHTS = {
    "gg": 1 + 0.4 * floats(D), "hh": floats(D), "wq": floats(D, 4), "bq": floats(4), "wk": floats(D, 5),
    "bk": floats(5), "big": floats(D, 7),
}  # fmt: skip
X = {"x": floats(2, 3, D)}


def absorb(text: str, feeds: dict[str, np.ndarray] = X, **more: np.ndarray):
    used = {k: np.asarray(v) for k, v in {**WEIGHTS, **more}.items() if k in text}
    return rewritten(declared(text, used), used, feeds, AbsorbNormAffine(), rtol=1e-4, atol=1e-5)


def _norm(model):
    return next(n for n in model.graph if n.op_type in ("LayerNormalization", "RMSNormalization"))


@pytest.mark.parametrize(
    "norm",
    ["n = LayerNormalization<axis=-1>(x, gg, hh)", "r = RMSNormalization<axis=-1>(x, gg)\n n = Add(r, hh)"],
)
def test_into_every_linear_reader_and_the_norm_is_marked(norm: str) -> None:
    text = f"""
        g (float[2,3,6] x) => (float[2,3,4] q, float[2,3,5] k) {{
            {norm}
            mq = MatMul(n, wq)
            q = Add(mq, bq)
            mk = MatMul(n, wk)
            k = Add(bk, mk)
        }}"""
    model, remarks = absorb(text)
    assert applied(remarks, "absorb") == 1
    assert ops(model).count("Add") == 2
    node = _norm(model)
    np.testing.assert_array_equal(constant(node.inputs[1]), np.ones(D))
    assert len(node.inputs) == 2
    assert node.metadata_props[IDENTITY_AFFINE] == "1"


def test_over_views_picked_tokens_and_means() -> None:
    text = """
        g (float[2,3,6] x) => (float[6,4] q, float[2,5] k, float[2,7] z) {
            n = LayerNormalization<axis=-1>(x, gg, hh)
            v = Reshape(n, flat)
            mq = MatMul(v, wq)
            q = Add(mq, bq)
            t = Gather<axis=1>(n, zero)
            mk = MatMul(t, wk)
            k = Add(mk, bk)
            p = ReduceMean<keepdims=0>(n, one)
            mz = MatMul(p, big)
            z = Add(mz, bz)
        }"""
    model, remarks = absorb(text, flat=np.array([-1, D]), zero=np.array(0), one=np.array([1]), bz=floats(7))
    assert applied(remarks, "absorb") == 1
    assert ops(model).count("Reshape") == 1


def test_into_a_convolution_of_one_tap() -> None:
    text = """
        g (float[2,4,4,6] x) => (float[2,8,4,4] y) {
            n = LayerNormalization<axis=-1>(x, gg, hh)
            t = Transpose<perm=[0,3,1,2]>(n)
            y = Conv(t, kernel, bias)
        }"""
    _, remarks = absorb(text, {"x": floats(2, 4, 4, 6)}, kernel=floats(8, D, 1, 1), bias=floats(8))
    assert applied(remarks, "absorb") == 1


def test_a_convolution_that_pads_takes_no_bias() -> None:
    text = """
        g (float[2,4,4,6] x) => (float[2,8,4,4] y) {
            n = LayerNormalization<axis=-1>(x, gg, hh)
            t = Transpose<perm=[0,3,1,2]>(n)
            y = Conv<pads=[1,1,1,1]>(t, kernel)
        }"""
    model, remarks = absorb(text, {"x": floats(2, 4, 4, 6)}, kernel=floats(8, D, 3, 3))
    assert "pads its input with zeros" in missed(remarks)[0]
    assert len(_norm(model).inputs) == 3


@pytest.mark.parametrize(
    ("line", "output", "why"),
    [("s = Sigmoid(n)", "float[2,3,6] s", "Sigmoid"), ("s = MatMul(n, y)", "float[2,3,3] s", "not constant")],
)
def test_one_reader_that_is_not_linear_keeps_it(line: str, output: str, why: str) -> None:
    text = f"""
        g (float[2,3,6] x, float[2,6,3] y) => (float[2,3,4] q, {output}) {{
            n = LayerNormalization<axis=-1>(x, gg, hh)
            mq = MatMul(n, wq)
            q = Add(mq, bq)
            {line}
        }}"""
    model, remarks = absorb(text, {**X, "y": floats(2, 6, 3)})
    assert why in missed(remarks)[0]
    assert len(_norm(model).inputs) == 3


def test_an_output_of_the_graph_keeps_it() -> None:
    text = """
        g (float[2,3,6] x) => (float[2,3,4] q, float[2,3,6] n) {
            n = LayerNormalization<axis=-1>(x, gg, hh)
            q = MatMul(n, wq)
        }"""
    _, remarks = absorb(text)
    assert "output of the graph" in missed(remarks)[0]


def test_a_bias_is_not_moved_where_it_would_cost_more() -> None:
    text = """
        g (float[2,3,6] x) => (float[2,3,7] y) {
            r = RMSNormalization<axis=-1>(x, gg)
            n = Add(r, hh)
            y = MatMul(n, big)
        }"""
    _, remarks = absorb(text)
    assert "would need a bias of 7 channels in all, to save 6" in missed(remarks)[0]
    cheaper, remarks = absorb(text.replace("big", "wq").replace("float[2,3,7]", "float[2,3,4]"))
    assert applied(remarks, "absorb") == 1
    assert ops(cheaper) == ["RMSNormalization", "MatMul", "Add"]


def test_a_norm_without_an_affine_map_is_nothing_to_tell() -> None:
    text = """
        g (float[2,3,6] x) => (float[2,3,4] y) {
            n = LayerNormalization<axis=-1>(x, ones)
            y = MatMul(n, wq)
        }"""
    _, remarks = absorb(text, ones=np.ones(D, np.float32))
    assert len(remarks) == 0

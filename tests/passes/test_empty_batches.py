"""A batch of 0 on a dynamic axis runs in the original and in what the preset makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import xform
from tests.support import declared, ops, parse, run
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


DEPTHWISE = {"w": numbers(6, 1, 3, 3)}
BLOCKS = {"w": numbers(4, 3, 3), "s4": np.array([0, 0, 4, 3]), "s3": np.array([0, 0, 12])}
CASES: dict[str, tuple[str, Mapping[str, np.ndarray], tuple[int, ...]]] = {
    "channel multiplier": (
        "g (float[N,3,8,8] x) => (float[N,6,6,6] y) { y = Conv<group = 3>(x, w) }",
        DEPTHWISE,
        (3, 8, 8),
    ),
    "channel multiplier, unknown width": (
        "g (float[N,3,8,W] x) => (float[N,6,6,V] y) { y = Conv<group = 3>(x, w) }",
        DEPTHWISE,
        (3, 8, 7),
    ),
    "computed target": (
        """g (float[N,S,6] x) => (float[N,T] y) {
            sh = Shape(x)  n = Gather<axis = 0>(sh, i0)  s = Gather<axis = 0>(sh, i1)  k = Mul(s, six)
            t = Concat<axis = 0>(n, k)  y = Reshape(x, t) }""",
        {"i0": np.array([0]), "i1": np.array([1]), "six": np.array([6])},
        (3, 6),
    ),
    "computed target in the middle": (
        """g (float[N,H,W,6] x) => (float[N,T,6] y) {
            sh = Shape(x)  n = Gather<axis = 0>(sh, i0)  h = Gather<axis = 0>(sh, i1)  w = Gather<axis = 0>(sh, i2)
            k = Mul(h, w)  t = Concat<axis = 0>(n, k, six)  y = Reshape(x, t) }""",
        {"i0": np.array([0]), "i1": np.array([1]), "i2": np.array([2]), "six": np.array([6])},
        (3, 2, 6),
    ),
    "views": (
        """g (float[N,4,6] x) => (float[N,6,4] y) {
            a = Reshape(x, s1)  b = Transpose<perm = [0, 2, 1]>(a)  c = Reshape(b, s2)  y = Relu(c) }""",
        {"s1": np.array([0, 4, 6]), "s2": np.array([0, 6, 4])},
        (4, 6),
    ),
    "block-diagonal product": (
        """g (float[N,S,12] x) => (float[N,S,12] y) {
            a = Reshape(x, s4)  b = Einsum<equation = "nsgi,gio->nsgo">(a, w)  y = Reshape(b, s3) }""",
        BLOCKS,
        (5, 12),
    ),
}


@pytest.mark.parametrize("sizes", [{"N": 2}, {"N": 0}])
def test_products_over_an_axis_that_may_be_empty_become_no_convolution(sizes: Mapping[str, int]) -> None:
    """Their kernels take no spatial size of 0."""
    _same_as_before(MOVED, sizes)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_runs(name: str) -> None:
    text, constants, shape = CASES[name]
    model = parse(declared(text, constants), constants)
    result = run_pipeline(model, resolve("exact"), verify="off").model
    for batch in (2, 0):
        feeds = {"x": numbers(batch, *shape, seed=1)}
        for got, want in zip(run(result, feeds), run(model, feeds), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_computed_target_that_merges_what_follows_becomes_flatten() -> None:
    text, constants, shape = CASES["computed target"]
    result = run_pipeline(parse(declared(text, constants), constants), resolve("exact"), verify="off").model
    assert ops(result) == ["Flatten"]
    assert run(result, {"x": numbers(0, *shape)})[0].shape == (0, 18)


MOVED = """g (float[N,4,5] x) => (float[N,4,3] y)
    <float[5,6] v = {0.5,-1,2,1,3,-2, 1,0.3,-2,1,0.7,2, 3,1,-1,0.2,1,1, -1,2,0.4,1,-3,1, 2,-1,1,3,0.6,-1},
     float[6,3] w = {1,-0.5,2, 0.3,1,-1, 2,1,0.7, -1,3,1, 0.4,-2,1, 1,1,-3},
     float[6] c = {1,-1,0.5,2,0.3,-2}, float[6] d = {2,1,-1,0.5,3,1}, float[3] f = {0.2,-1,1}> {
    s = Transpose<perm = [1, 2, 0]>(x)  r = Relu(s)  t = Transpose<perm = [2, 0, 1]>(r)
    a = MatMul(t, v)  b = Add(a, c)  m = Mul(b, d)  e = MatMul(m, w)  y = Add(e, f) }"""
FIVE_AXES = """g (float[N,2,3,4,8] q, float[N,2,3,8,T] k, float[N,2,3,T,8] v) => (float[N,2,3,4,8] y) {
    a = MatMul(q, k)  p = Softmax<axis = -1>(a)  y = MatMul(p, v) }"""
CHAINED = """g (float[N,4,1,4] q, float[N,4,4,T] k, float[N,4,T,4] v, float[N,4,4,T] l, float[N,4,T,4] w)
    => (float[N,4,1,4] y) { a = MatMul(q, k)  p = Softmax<axis = -1>(a)  b = MatMul(p, v)
    c = MatMul(b, l)  r = Softmax<axis = -1>(c)  y = MatMul(r, w) }"""


@pytest.mark.parametrize("sizes", [{"N": 2, "T": 5}, {"N": 0, "T": 5}, {"N": 2, "T": 0}])
@pytest.mark.parametrize("text", [FIVE_AXES, CHAINED], ids=["five axes", "chained"])
@pytest.mark.parametrize("portable", [False, True])
def test_attention_without_keys_or_batch_runs(text: str, portable: bool, sizes: Mapping[str, int]) -> None:
    _same_as_before(text, sizes, portable=portable)


def _same_as_before(text: str, sizes: Mapping[str, int], **options: bool) -> None:
    model = parse(text)
    feeds = {}
    for place, value in enumerate(model.graph.inputs):
        shape = [sizes[str(d)] if not isinstance(d, int) else d for d in value.shape or ()]
        feeds[value.name or ""] = numbers(*shape, seed=place)
    want = run(model, feeds)
    data = xform.optimize(ir.to_proto(model), verify="off", **options).artifact.to_bytes()
    got = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)
    assert got[0].shape == want[0].shape
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)

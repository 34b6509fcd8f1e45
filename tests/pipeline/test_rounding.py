"""Weights rounded on calibration rows."""

from __future__ import annotations

import numpy as np
from support import apply, parse, run

from xform.passes.integer import QuantizeProducts
from xform.passes.normalize.ranges import ChannelRange
from xform.pipeline.rounding import compensated_weights

RNG = np.random.default_rng(0)
MIX = RNG.standard_normal((6, 64))
W = {n: RNG.standard_normal(s).astype(np.float32) for n, s in (("a", (64, 96)), ("b", (96, 96)), ("c", (96, 128)))}
GRAPH = """g (float[n,64] x, float[64,96] a, float[96,96] b, float[96,128] c) => (float[n,128] y, float[n,96] z) {
    p = Relu(x) q = MatMul(p, a) r = Tanh(q) s = MatMul(r, b) t = Tanh(s) y = MatMul(t, c) z = MatMul(b, s2)
}""".replace("z = MatMul(b, s2)", "z = Tanh(s)")


def rows(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((64, 6)) @ MIX + 0.2 * generator.standard_normal((64, 64))
    return {"x": x.astype(np.float32)}


def test_compensated_weights_halve_the_error_on_rows_they_have_not_seen() -> None:
    model = parse(GRAPH, W)
    codes = compensated_weights(model, [rows(seed) for seed in range(8)], bits=7)
    assert sorted(codes) == ["a", "b", "c"] and all(
        c.dtype == np.int8 and s.dtype == np.float32 for c, s in codes.values()
    )
    feeds = rows(99)
    expected = run(model, feeds)[0]
    errors = []
    for given in ({}, codes):
        quantized = parse(GRAPH, W)
        apply(quantized, QuantizeProducts(weight_bits=7, smallest=0, per_row=True, codes=given))
        errors.append(float(np.linalg.norm(run(quantized, feeds)[0] - expected)))
    assert errors[1] < 0.7 * errors[0]


def test_weights_that_something_else_reads_too_are_left_out() -> None:
    graph = "g (float[n,64] x, float[64,64] a) => (float[n,64] y) { p = Relu(x) q = MatMul(p, a) y = Add(q, a) }"
    model = parse(graph, {"a": W["a"][:, :64]})
    assert compensated_weights(model, [rows(0)]) == {}


def test_rows_of_outlier_channels_are_zero_and_nothing_is_made_up_for_them() -> None:
    model = parse(GRAPH, W)
    peaks = np.ones(64)
    peaks[7] = 50.0
    ranges = {"p": ChannelRange(0 * peaks, peaks)}
    codes, scale = compensated_weights(model, [rows(0)], 8, ranges)["a"]
    assert (codes[7] == 0).all() and codes[6].any()
    without = {**W, "a": np.where(np.arange(64)[:, None] == 7, 0, W["a"]).astype(np.float32)}
    feeds = rows(0)
    feeds["x"][:, 7] = 0
    alone, _ = compensated_weights(parse(GRAPH, without), [feeds], 8)["a"]
    assert (np.abs(codes.astype(int) - alone) <= 1).all() and (codes == alone).mean() > 0.95
    assert scale.shape == (96,)

"""Streams through joins with several outputs, masks, padding and two towers: rebuilt with the same numbers."""

from __future__ import annotations

import numpy as np
from support import applied, declared, floats, ops, rewritten

from xform.passes.normalize import AbsorbNormAffine, LayerNormToRMSNorm

D = 8
WEIGHTS = {
    "table": floats(11, D) + 0.5, "other": floats(11, D) - 0.2, "g0": 1 + 0.3 * floats(D), "h0": floats(D),
    "g1": 1 + 0.3 * floats(D), "h1": floats(D), "g2": 1 + 0.3 * floats(D), "w": floats(D, D) + 0.3,
    "zero": np.array(0, np.float32), "pads": np.array([0, 1, 0, 0, 2, 0]), "head": floats(D, 5), "bias": floats(5),
}  # fmt: skip
IDS = {"ids": np.array([[1, 4, 2, 0], [3, 9, 10, 5]])}


def convert(text: str, feeds: dict[str, np.ndarray] = IDS):
    used = {k: np.asarray(v) for k, v in WEIGHTS.items() if k in text}
    passes = (LayerNormToRMSNorm(), AbsorbNormAffine())
    return rewritten(declared(text, used), used, feeds, *passes, rtol=1e-4, atol=1e-5)


def test_a_split_of_a_writer_that_is_not_linear() -> None:
    text = """
        g (int64[2,4] ids) => (float[2,2,8] a, float[2,2,8] b, float[2,4,8] c) {
            e = Gather(table, ids)
            t = Tanh(e)
            s, u = Split<axis=1, num_outputs=2>(t)
            a = LayerNormalization<axis=-1>(s, g0, h0)
            b = LayerNormalization<axis=-1>(u, g1, h1)
            c = LayerNormalization<axis=-1>(t, g2)
        }"""
    model, remarks = convert(text)
    assert applied(remarks, "stream") == 1
    assert ops(model).count("RMSNormalization") == 3
    assert ops(model).count("Split") == 1


def test_masks_with_zeros_and_padding() -> None:
    text = """
        g (int64[2,4] ids, bool[2,4,1] keep) => (float[2,7,8] y) {
            e = Gather(table, ids)
            k = Where(keep, e, zero)
            p = Pad(k, pads)
            y = LayerNormalization<axis=-1>(p, g0, h0)
        }"""
    keep = np.array([[1, 0, 1, 1], [0, 1, 1, 0]], bool)[..., None]
    model, _ = convert(text, {**IDS, "keep": keep})
    assert ops(model).count("RMSNormalization") == 1


def test_scaled_residuals_and_differences() -> None:
    text = """
        g (int64[2,4] ids) => (float[2,4,8] y) {
            e = Gather(table, ids)
            f = Gather(other, ids)
            m = MatMul(f, w)
            n = Neg(m)
            s = Mul(n, half)
            d = Sub(e, s)
            y = LayerNormalization<axis=-1>(d, g0, h0)
        }"""
    used = {k: np.asarray(v) for k, v in WEIGHTS.items() if k in text} | {"half": np.array(0.5, np.float32)}
    model, _ = rewritten(declared(text, used), used, IDS, LayerNormToRMSNorm(), rtol=1e-4, atol=1e-5)
    assert ops(model).count("RMSNormalization") == 1


def test_encoder_and_decoder_are_converted_apart() -> None:
    text = """
        g (int64[2,4] ids) => (float[2,4,5] y) {
            e = Gather(table, ids)
            n = LayerNormalization<axis=-1>(e, g0, h0)
            m = MatMul(n, w)
            f = Gather(other, ids)
            x = Add(f, m)
            k = LayerNormalization<axis=-1>(x, g1, h1)
            z = MatMul(k, head)
            y = Add(z, bias)
        }"""
    model, remarks = convert(text)
    assert applied(remarks, "stream") == 2
    assert applied(remarks, "absorb") == 2
    assert ops(model).count("RMSNormalization") == 2


def test_norms_in_a_branch_of_an_if() -> None:
    text = """
        g (int64[2,4] ids, bool c) => (float[2,4,8] y) {
            y = If(c) <
                then_branch = a () => (float[2,4,8] p) {
                    e = Gather(table, ids)
                    p = LayerNormalization<axis=-1>(e, g0, h0)
                },
                else_branch = b () => (float[2,4,8] q) {
                    q = Gather(other, ids)
                }
            >
        }"""
    for chosen in (True, False):
        model, remarks = convert(text, {**IDS, "c": np.array(chosen)})
        assert applied(remarks, "stream") == 1
        assert "RMSNormalization" in [n.op_type for n in model.graph.all_nodes()]

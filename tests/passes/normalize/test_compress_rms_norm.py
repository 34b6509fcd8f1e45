from __future__ import annotations

import numpy as np
import pytest
from support import applied, declared, floats, missed, ops, rewritten

from xform.graph.values import shape_of
from xform.passes.normalize import CompressRMSNorm

D = 9


def centred(array: np.ndarray, axis: int = -1) -> np.ndarray:
    return (array - array.mean(axis=axis, keepdims=True)).astype(np.float32)


WEIGHTS = {
    "table": centred(floats(11, D)), "pos": centred(floats(1, 5, D)), "g0": 1 + 0.3 * floats(D), "h0": floats(D),
    "w0": floats(D, 6), "b0": floats(6), "u0": centred(floats(6, D)), "c0": centred(floats(D)),
    "g1": 1 + 0.3 * floats(D), "head": floats(D, 7), "shape": np.array([10, D]), "back": np.array([2, -1, D]),
}  # fmt: skip
IDS = {"ids": np.array([[1, 4, 2, 0, 7], [3, 3, 9, 10, 5]])}
STREAM = """
    g (int64[2,5] ids) => (float[2,5,7] y) {
        e = Gather(table, ids)
        x0 = Add(e, pos)
        v0 = Reshape(x0, shape)
        z0 = Reshape(v0, back)
        n0 = RMSNormalization<axis=-1, epsilon=0.01>(z0, g0)
        s0 = Add(n0, h0)
        m0 = MatMul(s0, w0)
        a0 = Add(m0, b0)
        r0 = Relu(a0)
        d0 = MatMul(r0, u0)
        l0 = Add(d0, c0)
        x1 = Add(z0, l0)
        n1 = RMSNormalization<axis=-1>(x1, g1)
        f1 = Reshape(n1, shape)
        k1 = Reshape(f1, back)
        y = MatMul(k1, head)
    }"""


def compress(text: str = STREAM, multiple_of: int = 1, feeds: dict[str, np.ndarray] = IDS, **more: np.ndarray):
    used = {k: np.asarray(v) for k, v in {**WEIGHTS, **more}.items() if k in text}
    return rewritten(declared(text, used), used, feeds, CompressRMSNorm(multiple_of), rtol=1e-4, atol=1e-5)


def test_the_stream_loses_a_channel_and_the_numbers_stay() -> None:
    model, remarks = compress()
    assert applied(remarks, "compress") == 1
    assert "RMSNormalization" not in ops(model)
    widths = {shape_of(n.outputs[0])[-1] for n in model.graph if n.op_type in ("Gather", "ReduceSumSquare", "Reshape")}
    assert widths == {D - 1, 1}


def test_it_pays_only_where_the_new_width_fits_the_kernels() -> None:
    model, remarks = compress(multiple_of=3)
    assert "RMSNormalization" in ops(model)
    assert missed(remarks) == ["8 channels are no multiple of 3, so kernels take as long as for 9"]
    _, remarks = compress(multiple_of=8)
    assert applied(remarks, "compress") == 1


def test_shapes_that_are_computed_name_the_new_width() -> None:
    text = STREAM.replace("z0 = Reshape(v0, back)", "sh = Shape(e)\n z0 = Reshape(v0, sh)")
    text = text.replace("v0 = Reshape(x0, shape)", "v0 = Reshape(x0, flat)")
    model, remarks = compress(text, flat=np.array([-1, D]))
    assert applied(remarks, "compress") == 1
    assert ops(model).count("Where") == 1


def test_explicitly_recentred_writers_are_cut() -> None:
    text = STREAM.replace(
        "x0 = Add(e, pos)", "t = Tanh(e)\n mu = ReduceMean(t, last)\n q = Sub(t, mu)\n x0 = Add(q, pos)"
    )
    model, _ = compress(text, last=np.array([-1]))
    assert ops(model).count("Slice") == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"u0": floats(6, D)}, "writes a mean"),
        ({"table": floats(11, D)}, "has a mean"),
        ({"c0": floats(D)}, "writes a mean"),
    ],
)
def test_a_stream_with_a_mean_stays(change: dict[str, np.ndarray], why: str) -> None:
    _, remarks = compress(**change)
    assert why in missed(remarks)[0]


def test_other_readers_keep_the_stream() -> None:
    text = STREAM.replace("=> (float[2,5,7] y)", "=> (float[2,5,7] y, float[2,5,9] o)").replace(
        "n1 = RMS", "o = Sigmoid(x1)\n n1 = RMS"
    )
    _, remarks = compress(text)
    assert "is no RMSNormalization" in missed(remarks)[0]


def test_norms_that_something_else_reads_keep_the_stream() -> None:
    text = STREAM.replace("=> (float[2,5,7] y)", "=> (float[2,5,7] y, float[2,5,9] o)").replace(
        "f1 = Reshape", "o = Sigmoid(n1)\n f1 = Reshape"
    )
    _, remarks = compress(text)
    assert "Sigmoid" in missed(remarks)[0]

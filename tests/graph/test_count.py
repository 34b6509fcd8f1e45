"""Counts against formulas worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from support import floats, parse

from xform.graph.count import count

B, S, T, H, D = 2, 5, 7, 4, 8


@pytest.mark.parametrize(
    ("inputs", "body", "constants", "flops"),
    [
        ("float[2,5,8] x", "y = MatMul(x, w)", {"w": floats(8, 3)}, 2 * 2 * 5 * 3 * 8),
        ("float[5,8] x", "y = Gemm(x, w, b)", {"w": floats(8, 3), "b": floats(3)}, 2 * 5 * 3 * 8 + 5 * 3),
        ("float[8,5] x", "y = Gemm<transA=1>(x, w)", {"w": floats(8, 3)}, 2 * 5 * 3 * 8),
        ("float[1,4,9,9] x", "y = Conv<group=2>(x, w, b)", {"w": floats(6, 2, 3, 3), "b": floats(6)},
         6 * 7 * 7 * (2 * 2 * 9 + 1)),
        ("float[1,4,5,5] x", "y = ConvTranspose(x, w)", {"w": floats(4, 6, 3, 3)}, 2 * 4 * 5 * 5 * 6 * 9),
        (f"float[{B},{H},{S},{D}] x, float[{B},{H},{T},{D}] k, float[{B},{H},{T},{D}] v", "y = Attention(x, k, v)", {},
         B * H * S * T * (4 * D + 5)),
        (f"float[{B},{S},{H * D}] x, float[{B},{T},{H * D}] k, float[{B},{T},{H * D}] v",
         f"y = Attention<q_num_heads={H}, kv_num_heads={H}>(x, k, v)", {}, B * H * S * T * (4 * D + 5)),
        ("float[2,8] x", "y = LayerNormalization(x, w)", {"w": floats(8)}, 7 * 16),
        ("float[2,8] x", "y = RMSNormalization(x, w)", {"w": floats(8)}, 4 * 16),
        ("float[2,8] x", "y = Softmax(x)", {}, 5 * 16),
        ("float[2,8] x", "y = Gelu(x)", {}, 4 * 16),
        ("float[2,8] x", "y = Add(x, w)", {"w": floats(3, 1, 8)}, 48),
        ("float[2,8] x", "y = ReduceMean(x)", {}, 16),
        ("float[1,2,8,8] x", "y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)", {}, 2 * 16 * 4),
        ("float[5,2,3] x", "y, h, c = LSTM<hidden_size=4>(x, w, r)", {"w": floats(1, 16, 3), "r": floats(1, 16, 4)},
         5 * 2 * 4 * 4 * (2 * 7 + 3)),
        ("float[2,8] x", "y = Transpose(x)", {}, 0),
        ("float[2,5,8] x, float[2,8,3] z", """y = Einsum<equation="bij,bjk->bik">(x, z)""", {}, 2 * 2 * 5 * 8 * 3),
    ],
)  # fmt: skip
def test_flops(inputs: str, body: str, constants: dict[str, np.ndarray], flops: int) -> None:
    declared = [f"float[{','.join(map(str, a.shape))}] {n}" for n, a in constants.items()]
    counts = count(parse(f"g ({', '.join([inputs, *declared])}) => (y) {{ {body} }}", constants))
    assert counts.flops == flops
    assert counts.unknown == ()
    assert counts.assumed == ()
    assert counts.parameters == sum(a.size for a in constants.values())


def test_symbolic_dims_take_bindings_or_one() -> None:
    model = parse("g (float[batch,seq,8] x, float[8,3] w) => (y) { y = MatMul(x, w) }", {"w": floats(8, 3)})
    assert count(model).flops == 2 * 8 * 3
    assert count(model).assumed == ("batch", "seq")
    counts = count(model, {"batch": 2, "seq": 5})
    assert counts.flops == 2 * 10 * 8 * 3
    assert counts.assumed == ()


def test_bytes() -> None:
    text = "g (float16[2,8] x, float16[8] w) => (y) { h = Add(x, w) i = Reshape(h, t) y = Cast<to=1>(i) }"
    model = parse(text.replace("[8] w)", "[8] w, int64[1] t)"), {"w": floats(8, dtype="float16"), "t": np.array([16])})
    counts = count(model)
    assert [n.bytes for n in counts.nodes] == [32 + 16 + 32, 0, 32 + 64]
    assert counts.bytes == 80 + 96
    assert counts.parameter_bytes == 16 + 8


def test_shared_weight_counts_once_in_total() -> None:
    text = "g (float[2,8] x, float[8,8] w) => (y) { h = MatMul(x, w) y = MatMul(h, w) }"
    counts = count(parse(text, {"w": floats(8, 8)}))
    assert counts.parameters == 64
    assert [n.parameters for n in counts.nodes] == [64, 64]


def test_unknown_operators_are_named() -> None:
    counts = count(parse("g (float[2] x) => (y) { h = com.microsoft.Mystery(x) y = Relu(x) }"))
    assert counts.unknown == ("h",)
    assert counts.flops == 2

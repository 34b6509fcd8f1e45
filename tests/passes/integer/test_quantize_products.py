"""Matrix products in int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support import applied, apply, missed, ops, parse, run

from xform.passes.integer import QuantizeProducts
from xform.passes.integer.quantize_products import quantize_weight

RNG = np.random.default_rng(0)
K, N = 96, 128
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
W = (RNG.standard_normal((K, N)) * RNG.uniform(0.01, 2, N)).astype(np.float32)
GRAPH = f"g (float[2,5,{K}] x, float[{K},{N}] w) => (float[2,5,{N}] y) {{ y = MatMul(x, w) }}"


def quantized(weight: np.ndarray = W, **options: object) -> ir.Model:
    model = parse(GRAPH, {"w": weight})
    apply(model, QuantizeProducts(**options))  # type: ignore[arg-type]
    return model


def test_a_product_becomes_integer_and_stays_close() -> None:
    model = quantized(weight_bits=7)
    assert ops(model) == ["DynamicQuantizeLinear", "MatMulInteger", "Mul", "Cast", "Mul"]
    (found,) = run(model, {"x": X})
    expected = X @ W
    # half a step of each operand, as independent noise over K terms
    step_x, step_w = (X.max() - min(X.min(), 0)) / 255, np.abs(W).max(0) / 63
    noise = np.sqrt(K / 12) * np.hypot(step_x * W.std(0), step_w * X.std())
    assert (np.abs(found - expected) < 6 * noise).all()
    assert np.abs(found - expected).max() > 0


def test_the_scale_is_per_output_channel() -> None:
    weight = W.copy()
    weight[:, 0] *= 1000  # one large column must not take the others' resolution
    fine, coarse = (run(quantized(w, weight_bits=7), {"x": X})[0][..., 1:] for w in (W, weight))
    np.testing.assert_allclose(fine, coarse, rtol=1e-5, atol=1e-5)


def test_weights_of_seven_bits_cannot_saturate_sixteen_bit_sums() -> None:
    q, scale = quantize_weight(W, 63)
    assert q.dtype == np.int8 and np.abs(q).max() == 63 and 2 * 255 * int(np.abs(q).max()) < 2**15
    assert np.abs(q * scale - W).max() <= scale.max() / 2 * 1.001
    assert any(v.const_value is not None and v.dtype is ir.DataType.INT8 and np.abs(v.const_value.numpy()).max() == 63
               for v in quantized(weight_bits=7).graph.initializers.values())  # fmt: skip


def test_a_column_of_zeros_stays_zero() -> None:
    weight = W.copy()
    weight[:, 3] = 0
    found = run(quantized(weight), {"x": X})[0]
    assert (found[..., 3] == 0).all() and np.isfinite(found).all()


def test_products_in_keep_stay_and_are_told() -> None:
    model = parse(GRAPH, {"w": W})
    model.graph[0].name = "last"
    remarks = apply(model, QuantizeProducts(keep=("last",)))
    assert ops(model) == ["MatMul"] and "accuracy" in missed(remarks)[0]


@pytest.mark.parametrize(
    ("graph", "weight", "told"),
    [
        ("g (float[2,16] x, float[16,2048] w) => (float[2,2048] y) { y = MatMul(x, w) }", (16, 2048), True),
        ("g (float[2,40] x, float[40,40] w) => (float[2,40] y) { y = MatMul(x, w) }", (40, 40), True),
        ("g (float[3,2,96] x, float[3,96,128] w) => (float[3,2,128] y) { y = MatMul(x, w) }", (3, 96, 128), False),
    ],
)
def test_what_does_not_pay_or_fit_is_left_alone(graph: str, weight: tuple[int, ...], told: bool) -> None:
    model = parse(graph, {"w": RNG.standard_normal(weight).astype(np.float32)})
    remarks = apply(model, QuantizeProducts())
    assert ops(model) == ["MatMul"] and bool(missed(remarks)) == told


def test_doubles_variables_and_weights_that_are_not_finite_are_left_alone() -> None:
    double = parse(GRAPH.replace("float[", "double["), {"w": W.astype(np.float64)})
    variable = parse(GRAPH)
    broken = W.copy()
    broken[0, 0] = np.inf
    infinite = parse(GRAPH, {"w": broken})
    for model in (double, variable, infinite):
        remarks = apply(model, QuantizeProducts())
        assert ops(model) == ["MatMul"] and applied(remarks, "dynamic") == 0

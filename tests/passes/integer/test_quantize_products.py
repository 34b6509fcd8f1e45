"""Matrix products in int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support import applied, apply, missed, ops, parse, run

from xform.errors import UsageError
from xform.passes.integer import QuantizeProducts, QuantizeStatic
from xform.passes.integer import weight_codes as codes_module
from xform.passes.integer.quantize_products import outliers
from xform.passes.integer.weight_codes import compensated_codes, dot_product_instructions, weight_codes
from xform.passes.normalize.ranges import ChannelRange

RNG = np.random.default_rng(0)
K, N = 96, 128
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
W = (RNG.standard_normal((K, N)) * RNG.uniform(0.01, 2, N)).astype(np.float32)
GRAPH = f"g (float[2,5,{K}] x, float[{K},{N}] w) => (float[2,5,{N}] y) {{ y = MatMul(x, w) }}"


def quantized(weight: np.ndarray = W, **options: object) -> ir.Model:
    model = parse(GRAPH, {"w": weight})
    apply(model, QuantizeProducts(**options))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(("instructions", "bound"), [(True, 0.021), (False, 0.025)])
@pytest.mark.parametrize("quantizer", [QuantizeProducts, QuantizeStatic])
def test_the_bound_is_stricter_where_int8_gains_more(
    quantizer: type[QuantizeProducts | QuantizeStatic],
    instructions: bool,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codes_module, "dot_product_instructions", lambda: instructions)
    assert quantizer().max_error == bound
    assert quantizer(max_error=0.1).max_error == 0.1


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


@pytest.mark.parametrize("rows", [96, 95, 1])
def test_no_pair_of_weights_can_saturate_sixteen_bit_sums(rows: int) -> None:
    weight = RNG.standard_normal((rows, 300)) * RNG.choice([1.0, 8.0], (rows, 300), p=[0.9, 0.1])
    codes, scale = weight_codes(weight, 1, 0, 0)
    wide = np.pad(codes.astype(np.int64), ((0, rows % 2), (0, 0)))
    for sign in (1, -1):
        even, odd = (np.maximum(sign * wide[start::2], 0) for start in (0, 1))
        assert (even + odd).max() <= 128 and 255 * (even + odd).max() < 2**15
    assert np.abs(codes * scale - weight).max() <= scale.max() / 2 * 1.001
    assert rows == 1 or np.abs(codes).max() > 63  # more than seven bits would give


def test_integer_sums_are_exact_where_every_activation_is_the_largest() -> None:
    """The worst case for 16-bit sums, through the runtime's own kernel."""
    weight = np.abs(RNG.standard_normal((384, 64))).astype(np.float32)  # all of one sign
    graph = parse("g (float[7,384] x, float[384,64] w) => (float[7,64] y) { y = MatMul(x, w) }", {"w": weight})
    apply(graph, QuantizeProducts(weight_bits=0))
    (found,) = run(graph, {"x": np.ones((7, 384), np.float32)})
    codes, scale = weight_codes(weight, 1, 0, 0)
    if not dot_product_instructions():
        np.testing.assert_allclose(found[0], codes.astype(np.int64).sum(0) * scale, rtol=1e-5)
    np.testing.assert_allclose(found, np.broadcast_to(weight.sum(0), found.shape), rtol=0.02)


@pytest.mark.parametrize("bits", [7, 8])
def test_the_number_of_bits_can_be_given(bits: int) -> None:
    codes = [v.const_value.numpy() for v in quantized(weight_bits=bits).graph.initializers.values()
             if v.const_value is not None and v.dtype is ir.DataType.INT8]  # fmt: skip
    assert [np.abs(array).max() for array in codes] == [2 ** (bits - 1) - 1]
    with pytest.raises(UsageError, match="weight_bits"):
        quantized(weight_bits=bits - 4)


def spiky(factor: float) -> tuple[np.ndarray, ChannelRange]:
    """Rows whose channels 5 and 40 are larger than the others, and their ranges."""
    x = RNG.standard_normal((2, 5, K)).astype(np.float32)
    x[..., [5, 40]] *= factor
    rows = x.reshape(-1, K).astype(np.float64)
    return x, ChannelRange(rows.min(0), rows.max(0))


def test_outlier_channels_stay_in_float_and_the_rest_gets_their_resolution() -> None:
    x, span = spiky(40.0)
    assert outliers(span).tolist() == [5, 40]
    errors = []
    for ranges in ({}, {"x": span}):
        model = quantized(ranges=ranges)
        (found,) = run(model, {"x": x})
        errors.append(float(np.linalg.norm(found - x @ W) / np.linalg.norm(x @ W)))
        assert ("Gather" in ops(model)) == bool(ranges)
    assert errors[1] < errors[0] / 3


def test_outliers_beyond_the_calibrated_range_are_no_problem() -> None:
    x, span = spiky(40.0)
    x[..., [5, 40]] *= 100
    (found,) = run(quantized(ranges={"x": span}), {"x": x})
    np.testing.assert_allclose(found, x @ W, rtol=0, atol=0.02 * float(np.abs(x @ W).max()))


def test_with_a_scale_per_row_a_large_row_takes_no_resolution_from_the_others() -> None:
    x = RNG.standard_normal((2, 5, K)).astype(np.float32)
    x[0, 3] *= 300
    x[1, 2] = 0
    expected, errors = x @ W, []
    for per_row in (False, True):
        (found,) = run(quantized(per_row=per_row), {"x": x})
        assert np.isfinite(found).all() and (found[1, 2] == 0).all()
        small = [(0, 0), (0, 1), (1, 4)]
        errors.append(max(float(np.linalg.norm(found[i] - expected[i]) / np.linalg.norm(expected[i])) for i in small))
    assert errors[1] < 0.02 < 0.2 < errors[0]


def test_only_the_products_named_get_scales_per_row() -> None:
    model = parse(
        f"""g (float[5,{K}] x, float[{K},{N}] v, float[{K},{N}] w) => (float[5,{N}] y, float[5,{N}] z) {{
        y = MatMul(x, v) z = MatMul(x, w) }}""",
        {"v": W, "w": W},
    )
    for node, name in zip((n for n in model.graph if n.op_type == "MatMul"), ("plain", "rows"), strict=True):
        node.name = name
    apply(model, QuantizeProducts(row_scaled=("rows",)))
    x = RNG.standard_normal((5, K)).astype(np.float32)
    x[3] *= 300
    small = [0, 1, 2, 4]
    plain, rows = (
        np.linalg.norm((found - x @ W)[small]) / np.linalg.norm((x @ W)[small]) for found in run(model, {"x": x})
    )
    assert rows < 0.02 < 0.2 < plain and ops(model).count("Div") == 1


def gelu(x: np.ndarray) -> np.ndarray:
    return (x / (1 + np.exp(-1.702 * x))).astype(np.float32)


def test_rows_of_what_hardly_goes_below_zero_are_divided_by_their_largest_value() -> None:
    x = RNG.standard_normal((2, 5, K))
    x[0, :2] *= 3
    x[1, 0] = -np.abs(x[1, 0])  # a row that is all below zero, which divided by its magnitude reaches -1
    x = gelu(x)
    x[0, 3] = 0
    expected, errors, rows = x @ W, {}, x.reshape(-1, K)
    ranges = {"x": ChannelRange(rows.min(0), rows.max(0))}
    for name, given in (("any", {}), ("one-sided", ranges)):
        model = quantized(per_row=True, ranges=given)
        (found,) = run(model, {"x": x})
        assert ("Abs" in ops(model)) == (not given) and (found[0, 3] == 0).all()
        errors[name] = float(np.median(np.linalg.norm(found - expected, axis=-1)))
    assert errors["one-sided"] < 0.9 * errors["any"]  # weights are rounded as well
    (found,) = run(quantized(per_row=True, ranges=ranges), {"x": -5 * x})  # what calibration has not seen
    np.testing.assert_allclose(found, -5 * expected, rtol=0, atol=0.03 * float(np.abs(5 * expected).max()))


def test_compensated_codes_are_nearer_in_the_product_and_cannot_saturate() -> None:
    mix = RNG.standard_normal((12, 97))  # channels that go together, as those of real activations do
    x = RNG.standard_normal((400, 12)) @ mix + 0.3 * RNG.standard_normal((400, 97))
    weight = RNG.standard_normal((97, 40))
    errors = []
    for codes, scale in (weight_codes(weight, 1, 0, 0), compensated_codes(weight, x.T @ x / len(x), 0)):
        wide = np.pad(codes.astype(np.int64), ((0, 1), (0, 0)))
        assert max(sum(np.maximum(sign * wide[at::2], 0) for at in (0, 1)).max() for sign in (1, -1)) <= 128
        errors.append(float(np.linalg.norm(x @ (codes * scale - weight)) / np.linalg.norm(x @ weight)))
    assert errors[1] < errors[0] / 1.5


def test_compensation_is_plain_rounding_where_channels_are_independent() -> None:
    weight = RNG.standard_normal((64, 8))
    for bits in (7, 8):
        for found, expected in zip(
            compensated_codes(weight, np.eye(64), bits), weight_codes(weight, 1, 0, bits), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", ["even", "many", "narrow"])
def test_channels_that_do_not_stand_out_are_no_outliers(case: str) -> None:
    peak = RNG.uniform(1, 1.5, K)
    if case == "many":
        peak[:20] *= 40  # more than one in 32: float products of them would cost more than they save
    if case == "narrow":
        peak = np.r_[100.0, np.ones(20)]
    assert not len(outliers(ChannelRange(-peak, peak)))


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

"""Convolutions and products in int8 with calibrated scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support import applied, apply, declared, missed, ops, parse, run

from xform.errors import UsageError
from xform.graph.clone import clone
from xform.passes.integer import QuantizeStatic
from xform.passes.integer.quantize_static import activation_codes, multiply_adds, quantizable_inputs
from xform.passes.integer.weight_codes import dot_product_instructions, weight_codes
from xform.passes.normalize.ranges import ChannelRange, save_ranges
from xform.pipeline.calibration import activation_ranges
from xform.rewrite.passes import PassContext

RNG = np.random.default_rng(0)
CONV = "g (float[1,8,9,9] x) => (float[1,12,9,9] y) { y = Conv<pads=[1,1,1,1], group=1>(x, w, b) }"
FEEDS = {"x": RNG.standard_normal((1, 8, 9, 9)).astype(np.float32) + 1}
ALL = {"smallest": 0, "products": "static"}


def weights(*shape: int) -> np.ndarray:
    """Output channels of very different sizes."""
    columns = RNG.uniform(0.01, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (RNG.standard_normal(shape) * columns).astype(np.float32)


def conv_constants(outputs: int = 12, channels: int = 8) -> dict[str, np.ndarray]:
    return {"w": weights(outputs, channels, 3, 3), "b": RNG.standard_normal(outputs).astype(np.float32)}


def calibrated(model: ir.Model, feeds: Mapping[str, np.ndarray], **options: object) -> QuantizeStatic:
    return QuantizeStatic(activation_ranges(model, [feeds]), **{**ALL, **options})  # type: ignore[arg-type]


def quantized(
    text: str, constants: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray], **options: object
) -> tuple[ir.Model, float]:
    """The model after the pass, and its relative error; a second run must change nothing."""
    model = parse(declared(text, constants), constants)
    expected = run(model, feeds)[0]
    one = calibrated(model, feeds, **options)
    apply(model, one)
    assert not one.run(clone(model), PassContext())
    return model, float(np.linalg.norm(run(model, feeds)[0] - expected) / np.linalg.norm(expected))


def test_the_pair_means_what_it_says() -> None:
    constants = conv_constants()
    model, error = quantized(CONV, constants, FEEDS)
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv"] and 0 < error < 0.02
    x = FEEDS["x"]
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 255)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255) - zero  # exact integers from here on
    w, t = weight_codes(constants["w"], 0, 1, 8 if dot_product_instructions() else 0)
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    sums = np.einsum("bchwij,mcij->bmhw", windows.astype(np.int64), w.astype(np.int64))
    want = sums * (scale * t.astype(np.float64)).reshape(-1, 1, 1) + constants["b"].reshape(-1, 1, 1)
    np.testing.assert_allclose(run(model, FEEDS)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [0, 7, 8])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-0.2, 5.0), (-4.0, 4.0), (-7.0, -1.0), (2.0, 3.0)])
def test_asymmetric_ranges_lose_little(bits: int, low: float, high: float) -> None:
    feeds = {"x": RNG.uniform(low, high, (1, 8, 9, 9)).astype(np.float32)}
    assert 0 < quantized(CONV, conv_constants(), feeds, weight_bits=bits)[1] < 0.025


@pytest.mark.parametrize(("group", "channels"), [(1, 8), (2, 4)])
def test_groups_of_four_channels_or_more_are_quantized(group: int, channels: int) -> None:
    text = CONV.replace("group=1", f"group={group}")
    model, error = quantized(text, conv_constants(channels=channels), FEEDS)
    assert "QuantizeLinear" in ops(model) and 0 < error < 0.02


@pytest.mark.parametrize(("group", "outputs"), [(4, 12), (8, 8), (8, 16)])
def test_depthwise_convolutions_stay_in_float(group: int, outputs: int) -> None:
    text = CONV.replace("group=1", f"group={group}").replace("12,9,9", f"{outputs},9,9")
    constants = conv_constants(outputs, 8 // group)
    model = parse(declared(text, constants), constants)
    remarks = apply(model, calibrated(model, FEEDS))
    assert ops(model) == ["Conv"] and f"groups of {8 // group} input channels" in missed(remarks)[0]


def test_a_product_has_one_scale_per_column_and_keeps_its_bias_in_float() -> None:
    constants = {"w": weights(64, 40).T.copy(), "b": RNG.standard_normal(64).astype(np.float32)}
    feeds = {"x": RNG.standard_normal((2, 5, 40)).astype(np.float32)}
    text = "g (float[2,5,40] x) => (float[2,5,64] y) { m = MatMul(x, w) y = Add(m, b) }"
    model, error = quantized(text, constants, feeds)
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add"]
    assert 0 < error < 0.02
    scales = [v for v in model.graph.initializers.values() if v.name and v.name.startswith("w_scale")]
    assert [tuple(v.shape or ()) for v in scales] == [(64,)]


def test_all_readers_of_an_activation_share_one_pair() -> None:
    constants = {"w": weights(8, 8, 1, 1), "v": weights(4, 8, 3, 3), "u": weights(9, 8, 1, 1)}
    text = """g (float[1,8,9,9] x) => (float[1,8,9,9] a, float[1,4,7,7] c, float[1,9,9,9] d, float[1,8,9,9] e) {
        r = Relu(x) a = Conv(r, w) c = Conv(r, v) d = Conv(r, u) e = Neg(r) }"""
    model, _ = quantized(text, constants, FEEDS)
    assert ops(model).count("QuantizeLinear") == 1 and ops(model).count("DequantizeLinear") == 1 + 3
    negated = next(node for node in model.graph if node.op_type == "Neg")
    producer = negated.inputs[0].producer() if negated.inputs[0] is not None else None
    assert producer is not None and producer.op_type == "Relu"  # what is no product reads float


def test_each_reader_keeps_its_own_name_and_decides_for_itself() -> None:
    constants = {"w": weights(8, 8, 1, 1), "v": weights(8, 8, 3, 3)}
    text = "g (float[1,8,9,9] x) => (float[1,8,9,9] a, float[1,8,7,7] c) { a = Conv(x, w) c = Conv(x, v) }"
    model = parse(declared(text, constants), constants)
    for node, name in zip(model.graph, ("one", "three"), strict=True):
        node.name = name
    both, first = clone(model), clone(model)
    apply(both, calibrated(both, FEEDS))
    origins = [n.metadata_props["xform.origin"] for n in both.graph if n.op_type == "Conv"]
    assert sorted(origins) == ["one", "three"]
    remarks = apply(first, calibrated(first, FEEDS, keep=("three",)))
    assert ops(first).count("DequantizeLinear") == 2 and "accuracy" in missed(remarks)[0]
    assert applied(remarks, "static") == 1


def test_what_has_few_multiply_adds_or_no_instructions_stays_in_float_and_is_told() -> None:
    constants = {"w": weights(8, 8, 1, 1), "m": weights(64, 64)}
    text = """g (float[1,8,1,1] x, float[2,64] z) => (float[1,8,1,1] y, float[2,64] t) {
        y = Conv(x, w) t = MatMul(z, m) }"""
    feeds = {"x": RNG.standard_normal((1, 8, 1, 1)), "z": RNG.standard_normal((2, 64))}
    model = parse(declared(text, constants), constants)
    numbers = [multiply_adds(node) for node in model.graph]
    assert numbers == [64, 2 * 64 * 64]
    ranges = activation_ranges(model, [{k: v.astype(np.float32) for k, v in feeds.items()}])
    remarks = apply(model, QuantizeStatic(ranges, products="float", few_rows=0))
    assert set(ops(model)) == {"Conv", "MatMul"}
    told = " ".join(missed(remarks))
    assert "64 multiply-adds are too few" in told and "no dot-product instructions" in told


def test_what_was_not_measured_or_is_not_finite_is_told() -> None:
    constants = conv_constants()
    model = parse(declared(CONV, constants), constants)
    assert "no range for x" in missed(apply(model, QuantizeStatic({}, **ALL)))[0]
    endless = {"x": ChannelRange(np.array([-np.inf]), np.array([1.0]))}
    assert "not finite" in missed(apply(model, QuantizeStatic(endless, **ALL)))[0]
    constants["w"][0, 0, 0, 0] = np.nan
    model = parse(declared(CONV, constants), constants)
    assert "a weight is not finite" in missed(apply(model, calibrated(model, FEEDS)))[0]
    assert ops(model) == ["Conv"]


def test_doubles_and_variable_weights_are_none_of_its_business() -> None:
    double = {name: array.astype(np.float64) for name, array in conv_constants().items()}
    for model in (
        parse(declared(CONV.replace("float[", "double["), double), double),
        parse("g (float[2,40] x, float[40,40] w) => (float[2,40] y) { y = MatMul(x, w) }"),
    ):
        assert quantizable_inputs(model) == []
        assert len(apply(model, QuantizeStatic({}, **ALL))) == 0


def test_ranges_come_from_a_file_too_and_are_demanded(tmp_path: Path) -> None:
    constants = conv_constants()
    model = parse(declared(CONV, constants), constants)
    save_ranges(tmp_path / "ranges.npz", activation_ranges(model, [FEEDS]))
    apply(model, QuantizeStatic(str(tmp_path / "ranges.npz"), **ALL))
    assert "QuantizeLinear" in ops(model)
    with pytest.raises(UsageError, match="needs the ranges"):
        QuantizeStatic().rules()
    with pytest.raises(UsageError, match="weight_bits"):
        QuantizeStatic(weight_bits=4).rules()


def test_ranges_span_all_batches_inputs_of_the_graph_included() -> None:
    text = "g (float[1,8,9,9] x) => (float[1,8,9,9] y) { r = Conv(x, w) y = Conv(r, w) }"
    constants = {"w": weights(8, 8, 1, 1)}
    model = parse(declared(text, constants), constants)
    ranges = activation_ranges(model, [FEEDS, {"x": 3 * FEEDS["x"]}])
    assert set(ranges) == {"x", "r"}
    x = FEEDS["x"]
    np.testing.assert_allclose([ranges["x"].low[0], ranges["x"].high[0]], [3 * x.min(), 3 * x.max()], rtol=1e-6)


# Codes


@pytest.mark.parametrize("channels", [1, 2, 7, 8])
def test_no_pair_of_neighbours_can_saturate_and_little_is_lost(channels: int) -> None:
    weight = RNG.standard_normal((50, channels, 3, 3)).astype(np.float32)
    codes, scale = weight_codes(weight, 0, 1, 0)
    wide = np.pad(codes.astype(int), ((0, 0), (0, channels % 2), (0, 0), (0, 0)))
    for sign in (1, -1):
        pairs = np.maximum(sign * wide[:, 0::2], 0) + np.maximum(sign * wide[:, 1::2], 0)
        assert 255 * pairs.max() < 2**15
    assert np.abs(codes * scale.reshape(-1, 1, 1, 1) - weight).max() <= scale.max() / 2 * 1.001
    narrow = weight_codes(weight, 0, 1, 7)[1]
    assert (scale <= narrow * 1.001).all()  # never worse than 7 bits
    if channels == 1:
        np.testing.assert_allclose(scale, weight_codes(weight, 0, 1, 8)[1])


def test_pairs_are_along_the_input_axis() -> None:
    weight = np.array([[100.0, 1.0], [100.0, -1.0]], np.float32)  # [K, N]: both of the first column
    first, second = weight_codes(weight, 1, 0, 0)[0].T.tolist()
    assert first in ([63, 63], [64, 64]) and second == [127, -127]
    assert weight_codes(weight, 0, 1, 0)[0].tolist() == [[126, 1], [127, -1]]


def test_channels_and_tensors_of_zeros_get_a_scale_all_the_same() -> None:
    codes, scale = weight_codes(np.zeros((3, 4), np.float32), 0, 1, 0)
    assert (codes == 0).all() and (scale == 1).all()
    assert [float(v) for v in activation_codes(ChannelRange(np.zeros(1), np.zeros(1)))] == [1.0, 0.0]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0)])
def test_codes_cover_the_range_and_zero_is_exact(low: float, high: float) -> None:
    scale, zero = activation_codes(ChannelRange(np.array([low]), np.array([high])))
    assert scale.shape == zero.shape == () and zero.dtype == np.uint8 and scale.dtype == np.float32
    s, z = float(scale), float(zero)
    assert (0 - z) * s <= min(low, 0) + s and (255 - z) * s >= max(high, 0) - s


HEAD = "g (float[{rows},256] x) => (float[{rows},300] y) {{ m = MatMul(x, w) y = Add(m, b) }}"


def head_constants(columns: int = 300) -> dict[str, np.ndarray]:
    return {"w": weights(columns, 256).T.copy(), "b": RNG.standard_normal(columns).astype(np.float32)}


@pytest.mark.parametrize("rows", [1, 8])
def test_of_a_product_of_few_rows_the_weight_alone_is_in_int8(rows: int) -> None:
    constants = head_constants()
    feeds = {"x": RNG.standard_normal((rows, 256)).astype(np.float32)}
    model = parse(declared(HEAD.format(rows=rows), constants), constants)
    log = apply(model, QuantizeStatic({}, products="float"))  # no range is needed
    assert ops(model) == ["DequantizeLinear", "MatMul", "Add"] and applied(log, "weight") == 1
    codes, scale = weight_codes(constants["w"], 1, 0, 8)
    expected = feeds["x"].astype(np.float64) @ (codes * scale.astype(np.float64)) + constants["b"]
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-5, atol=1e-4)


def test_other_products_are_not_bound_by_their_weight() -> None:
    constants = head_constants()
    for rows, options in ((9, {}), (8, {"few_rows": 0}), ("b", {})):
        model = parse(declared(HEAD.format(rows=rows), constants), constants)
        log = apply(model, QuantizeStatic({}, products="static", **options))  # type: ignore[arg-type]
        assert ops(model) == ["MatMul", "Add"] and any("there is no range for x" in one for one in missed(log))
    kept = parse(declared(HEAD.format(rows=1), constants), constants)
    kept.graph[0].name = "head"
    assert any(
        "too much accuracy" in one for one in missed(apply(kept, QuantizeStatic({}, products="float", keep=("head",))))
    )
    constants = head_constants(200)
    small = parse(declared(HEAD.format(rows=1).replace("300", "200"), constants), constants)
    assert any(
        "51200 weights are too few to pay" in one for one in missed(apply(small, QuantizeStatic({}, products="float")))
    )
    constants["w"][3, 3] = np.inf
    bad = parse(declared(HEAD.format(rows=1).replace("300", "200"), constants), constants)
    assert any("not finite" in one for one in missed(apply(bad, QuantizeStatic({}, products="float"))))

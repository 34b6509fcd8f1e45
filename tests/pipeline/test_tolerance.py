"""The error measure: what counts as equal and what does not."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xform.capture.onnx_file import capture_onnx
from xform.errors import UsageError
from xform.pipeline.tolerance import (
    EXACTLY_EQUAL,
    Tolerance,
    computed_in,
    default_tolerance,
    difference,
    resolve_tolerance,
)

_difference = difference
FLOAT32 = default_tolerance(ir.DataType.FLOAT, "exact")


def test_table_is_ordered_by_roundoff():
    order = [ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E5M2]
    for fidelity in ("exact", "approximate"):
        limits = [default_tolerance(dtype, fidelity).rtol for dtype in order]
        assert limits == sorted(limits)
    assert default_tolerance(ir.DataType.FLOAT, "approximate").rtol > FLOAT32.rtol


@pytest.mark.parametrize("dtype", [ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.BOOL, ir.DataType.STRING])
def test_what_is_not_rounded_must_be_equal(dtype):
    assert default_tolerance(dtype, "exact") == EXACTLY_EQUAL
    assert resolve_tolerance(0.1, "y", dtype, "exact", None) == EXACTLY_EQUAL


def test_float32_output_of_a_float16_model_is_judged_as_float16():
    half = default_tolerance(ir.DataType.FLOAT, "exact", ir.DataType.FLOAT16)
    assert half == default_tolerance(ir.DataType.FLOAT16, "exact")


def test_computed_in(planted):
    model = planted.chain(2)
    assert computed_in(model) == {"y": ir.DataType.FLOAT}
    model.graph[1].outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    assert computed_in(model) == {"y": ir.DataType.BFLOAT16}


@pytest.mark.parametrize("narrow", ["float16", "bfloat16", "float8e4m3fn"])
def test_a_narrow_cast_beside_an_output_does_not_loosen_it(narrow):
    codes = {"float16": 10, "bfloat16": 16, "float8e4m3fn": 17}
    text = f"""<ir_version: 10, opset_import: ["" : 19]> g (float[2,4] x, float[2] z) => (float[2,4] y, float[2] zz)
        {{ y = Softmax(x) n = Cast<to = {codes[narrow]}>(z) zz = Cast<to = 1>(n) }}"""
    model = infer_shapes_of(text)
    found = computed_in(model)
    assert found["y"] is ir.DataType.FLOAT
    assert found["zz"] is ir.DataType[narrow.upper()]


def test_what_a_branch_computes_in_counts_for_its_output():
    text = """<ir_version: 10, opset_import: ["" : 19]> g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { h = Cast<to = 10>(x) a = Cast<to = 1>(h) },
                    else_branch = e () => (float[2] b) { b = Identity(x) }> }"""
    assert computed_in(infer_shapes_of(text))["y"] is ir.DataType.FLOAT16


def infer_shapes_of(text: str) -> ir.Model:
    return capture_onnx(onnx.parser.parse_model(text))


def test_trained_has_no_tolerance():
    with pytest.raises(UsageError, match="trained"):
        default_tolerance(ir.DataType.FLOAT, "trained")
    assert resolve_tolerance(0.5, "y", ir.DataType.FLOAT, "trained", None).rtol == 0.5


def test_user_tolerance():
    assert resolve_tolerance(1e-7, "y", ir.DataType.FLOAT, "exact", None) == Tolerance(1e-7, 1e-7)
    assert resolve_tolerance({"y": 1e-2}, "z", ir.DataType.FLOAT, "exact", None) == FLOAT32
    assert resolve_tolerance({"y": Tolerance(1, 2)}, "y", ir.DataType.FLOAT, "exact", None) == Tolerance(1, 2)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="tolerance"):
            resolve_tolerance(wrong, "y", ir.DataType.FLOAT, "exact", None)


def test_a_small_part_beside_a_large_one_is_judged_by_its_own_scale():
    rng = np.random.default_rng(5)
    large, small = 3e4 * rng.normal(size=(4, 8)), rng.uniform(0.1, 1, size=(4, 8))
    for axis in (0, 1):
        reference = np.concatenate([large, small], axis=axis).astype(np.float32)
        assert not difference(
            np.concatenate([large, small * 1.3], axis=axis).astype(np.float32), reference, FLOAT32
        ).agrees
        assert difference(reference.copy(), reference, FLOAT32).agrees
    woven = np.stack([large, small], axis=-1).astype(np.float32)
    assert not difference(np.stack([large, small * 1.3], axis=-1).astype(np.float32), woven, FLOAT32).agrees
    assert difference(np.stack([large, small * 1.3], axis=-1).astype(np.float32), woven, FLOAT32, "output").agrees


def test_a_tiny_output_has_a_tiny_tolerance():
    reference = 1e-6 * np.random.default_rng(6).normal(size=(4, 8)).astype(np.float32)
    assert not difference(reference * np.float32(1.01), reference, FLOAT32).agrees


def test_relative_to_the_scale_of_the_output():
    reference = np.linspace(-5, 5, 101).astype(np.float32)

    def difference(a, b, limit):
        return _difference(a, b, limit, "output")

    assert difference(reference + np.float32(4e-4), reference, FLOAT32).agrees
    gap = difference(reference + np.float32(1e-3), reference, FLOAT32)
    assert not gap.agrees
    assert gap.max_abs == pytest.approx(1e-3, rel=1e-2)
    assert gap.max_rel == pytest.approx(2e-4, rel=2e-2)
    assert "elements differ" in gap.reason


@pytest.mark.parametrize("outlier", [np.finfo(np.float32).min, 1e9])
def test_a_mask_value_excuses_nothing_else(outlier):
    reference = np.ones(100, np.float32)
    reference[0] = outlier
    wrong = reference.copy()
    wrong[5] = 2
    gap = difference(wrong, reference, FLOAT32)
    assert not gap.agrees
    near = reference.copy()
    near[0] *= np.float32(1 - 2e-5)
    assert difference(near, reference, FLOAT32).agrees


def test_nan_and_infinity_must_meet_their_like():
    reference = np.array([1, np.nan, np.inf, -np.inf], np.float32)
    assert difference(reference.copy(), reference, FLOAT32).agrees
    for index, value in ((0, np.nan), (1, 1.0), (2, -np.inf), (2, 3e38), (0, np.inf)):
        wrong = reference.copy()
        wrong[index] = value
        gap = difference(wrong, reference, FLOAT32)
        assert not gap.agrees, (index, value)
        assert gap.reason


def test_zeros():
    zeros = np.zeros(4, np.float32)
    assert difference(zeros, zeros, FLOAT32).agrees
    assert difference(zeros + np.float32(9e-7), zeros, FLOAT32).agrees
    assert not difference(zeros + np.float32(1e-5), zeros, FLOAT32).agrees
    assert difference(zeros[:0], zeros[:0], FLOAT32).agrees


def test_integers_strings_shapes_dtypes():
    ints = np.arange(4)
    assert difference(ints, ints, EXACTLY_EQUAL).agrees
    assert not difference(ints + 1, ints, EXACTLY_EQUAL).agrees
    assert difference(ints + 1, ints, Tolerance(0, 1)).agrees
    big = np.array([2**62], np.int64)
    assert not difference(big + 1, big, EXACTLY_EQUAL).agrees  # equal as float64
    words = np.array(["a", "b"], object)
    assert difference(words, words.copy(), EXACTLY_EQUAL).agrees
    assert not difference(np.array(["a", "c"], object), words, EXACTLY_EQUAL).agrees
    assert "shape" in difference(ints[:2], ints, EXACTLY_EQUAL).reason
    assert "dtype" in difference(ints.astype(np.int32), ints, EXACTLY_EQUAL).reason


def test_sequences_and_optionals():
    one, two = np.ones(2, np.float32), np.full(2, 2, np.float32)
    assert difference([one, two], [one, two], FLOAT32).agrees
    assert not difference([one, one], [one, two], FLOAT32).agrees
    assert not difference([one], [one, two], FLOAT32).agrees
    assert not difference(one, [one], FLOAT32).agrees
    assert difference(None, None, FLOAT32).agrees
    assert not difference(None, one, FLOAT32).agrees

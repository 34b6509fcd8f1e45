"""RepQuant's layer-wise scales and SmoothQuant's migration: what they share, and what each promises."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import applied, declared, floats, missed, parse, rewritten, run

from xform.errors import UsageError
from xform.passes.normalize import LayerWiseScales, MigrateScales
from xform.passes.normalize.layer_wise_scales import SCALE, ZERO_POINT, Quantization, channel_wise, layer_wise
from xform.passes.normalize.migrate_scales import MIGRATED, migration_scales
from xform.passes.normalize.ranges import ChannelRange, load_ranges, save_ranges
from xform.pipeline.calibration import norm_ranges, observe

D = 6
TEXT = """
    g (float[4,6] x) => (float[4,4] q, float[4,5] k) {
        n = LayerNormalization<axis=-1>(x, gg, hh)
        mq = MatMul(n, wq)
        q = Add(mq, bq)
        k = MatMul(n, wk)
    }"""
WEIGHTS = {
    "gg": (1 + 0.4 * floats(D)) * np.array([1, 30, 1, 1, 0.1, 1], np.float32), "hh": floats(D) * 3, "wq": floats(D, 4),
    "bq": floats(4), "wk": floats(D, 5),
}  # fmt: skip
X = {"x": floats(4, D)}


def _model() -> ir.Model:
    return parse(declared(TEXT, WEIGHTS), WEIGHTS)


def _norm_result(model: ir.Model) -> np.ndarray:
    node = next(n for n in model.graph if n.op_type == "LayerNormalization")
    return np.asarray(next(iter(observe(model, [X], [node.outputs[0]])))[0], np.float64)


def test_ranges_are_those_of_all_batches() -> None:
    batches = [X, {"x": 2 * X["x"] + 1}, {"x": -X["x"]}]
    ranges = norm_ranges(_model(), batches)
    model = _model()
    values = [n.outputs[0] for n in model.graph if n.op_type == "LayerNormalization"]
    every = np.concatenate([arrays[0] for arrays in observe(model, batches, values)])
    np.testing.assert_allclose(ranges["n"].low, every.min(axis=0))
    np.testing.assert_allclose(ranges["n"].peak, np.abs(every).max(axis=0))


def test_ranges_go_through_a_file(tmp_path: Path) -> None:
    ranges = norm_ranges(_model(), [X])
    save_ranges(tmp_path / "ranges.npz", ranges)
    np.testing.assert_array_equal(load_ranges(str(tmp_path / "ranges.npz"))["n"].low, ranges["n"].low)


def test_missing_or_broken_ranges_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the ranges"):
        LayerWiseScales().rules()
    with pytest.raises(UsageError, match="cannot be read"):
        MigrateScales(str(tmp_path / "none.npz")).rules()
    with (tmp_path / "bad.npz").open("wb") as file:
        np.savez(file, n=np.zeros(3))
    with pytest.raises(UsageError, match=r"shape \[2, C\]"):
        load_ranges(str(tmp_path / "bad.npz"))
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UsageError, match="not a regular file"):  # and does not wait for a writer
        load_ranges(str(tmp_path / "pipe.npz"))


def test_a_norm_may_have_any_name(tmp_path: Path) -> None:
    found = ChannelRange(np.array([-1.0, 0.0]), np.array([2.0, 3.0]))
    save_ranges(tmp_path / "ranges.npz", {"file": found, "allow_pickle": found})
    read = load_ranges(tmp_path / "ranges.npz")
    assert list(read) == ["file", "allow_pickle"]
    np.testing.assert_array_equal(read["file"].high, found.high)


def test_layer_wise_scales_leave_outputs_and_codes_as_they_were() -> None:
    ranges = norm_ranges(_model(), [X])
    model, remarks = rewritten(declared(TEXT, WEIGHTS), WEIGHTS, X, LayerWiseScales(ranges), rtol=1e-4, atol=1e-4)
    assert applied(remarks, "layer_wise") == 1
    metadata = next(n for n in model.graph if n.op_type == "LayerNormalization").metadata_props
    layer = Quantization(np.asarray(float(metadata[SCALE])), np.asarray(int(metadata[ZERO_POINT])), 8)
    channels = channel_wise(ranges["n"], 8)
    assert channels is not None
    before, after = channels.codes(_norm_result(_model())), layer.codes(_norm_result(model))
    np.testing.assert_array_equal(before, after)
    assert len(np.unique(before)) > 5
    assert 0 <= int(metadata[ZERO_POINT]) <= 255
    naive = Quantization(layer.scale, np.asarray(channels.zero.mean()), 8)
    assert np.any(naive.codes(_norm_result(_model())) != before), "one scale without the change gives other codes"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.sampled_from([4, 8]))
def test_codes_are_equal_in_float64_for_any_ranges(seed: int, width: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, width)) * np.exp(2 * rng.standard_normal(width)) + 3 * rng.standard_normal(width)
    channels = channel_wise(ChannelRange(x.min(axis=0), x.max(axis=0)), bits)
    assert channels is not None
    layer = layer_wise(channels)
    assert 0 <= layer.zero < 2**bits and layer.zero == np.round(layer.zero)
    r = channels.scale / layer.scale
    moved = x / r - layer.scale * (layer.zero - channels.zero)
    edge = np.abs(np.abs(x / channels.scale - np.floor(x / channels.scale)) - 0.5) < 1e-9  # a tie may go either way
    assert np.all((channels.codes(x) == layer.codes(moved)) | edge)


def test_channels_that_do_not_vary_have_no_scale() -> None:
    assert channel_wise(ChannelRange(np.ones(3), np.ones(3)), 8) is None
    assert channel_wise(ChannelRange(np.zeros(2), np.array([1.0, np.inf])), 8) is None
    one = channel_wise(ChannelRange(np.zeros(2), np.array([1.0, 0.0])), 8)
    assert one is not None and np.all(one.scale > 0)


def test_a_norm_without_ranges_is_told() -> None:
    _, remarks = rewritten(declared(TEXT, WEIGHTS), WEIGHTS, X, LayerWiseScales({}), rtol=1e-4)
    assert missed(remarks) == ["there are no ranges for n"]
    short = {"n": ChannelRange(np.zeros(2), np.ones(2))}
    _, remarks = rewritten(declared(TEXT, WEIGHTS), WEIGHTS, X, LayerWiseScales(short), rtol=1e-4)
    assert "2 channels, the norm 6" in missed(remarks)[0]


def test_migration_keeps_the_outputs_and_balances_the_peaks() -> None:
    ranges = norm_ranges(_model(), [X])
    model, remarks = rewritten(declared(TEXT, WEIGHTS), WEIGHTS, X, MigrateScales(ranges), rtol=1e-4, atol=1e-4)
    assert applied(remarks, "migrate") == 1
    assert next(n for n in model.graph if n.op_type == "LayerNormalization").metadata_props[MIGRATED] == "0.5"
    before, after = np.abs(_norm_result(_model())).max(axis=0), np.abs(_norm_result(model)).max(axis=0)
    assert after.max() / after.min() < 0.3 * before.max() / before.min()
    both = np.maximum(np.abs(WEIGHTS["wq"]).max(axis=1), np.abs(WEIGHTS["wk"]).max(axis=1))
    np.testing.assert_allclose(after, np.sqrt(before * both), rtol=1e-4)


def test_all_of_the_difficulty_can_move() -> None:
    np.testing.assert_allclose(migration_scales(np.array([4.0, 9.0]), np.array([1.0, 2.0]), 1.0), [4.0, 9.0])
    np.testing.assert_allclose(migration_scales(np.array([0.0, 1.0]), np.array([1.0, 0.0]), 0.5), [1e-5**0.5, 1e5**0.5])
    with pytest.raises(UsageError, match="between 0 and 1"):
        MigrateScales({}, alpha=1.5).rules()


def test_a_reader_that_is_not_linear_keeps_both_away() -> None:
    text = TEXT.replace("k = MatMul(n, wk)", "k = Relu(n)").replace("float[4,5] k", "float[4,6] k")
    used = {k: v for k, v in WEIGHTS.items() if k != "wk"}
    ranges = {"n": ChannelRange(-np.ones(D), np.ones(D))}
    for one in (LayerWiseScales(ranges), MigrateScales(ranges)):
        _, remarks = rewritten(declared(text, used), used, X, one, rtol=1e-5)
        assert "Relu" in missed(remarks)[0]


def test_ranges_do_not_change_what_a_model_gives() -> None:
    model = _model()
    want = run(model, X)
    norm_ranges(model, [X])
    np.testing.assert_array_equal(run(model, X)[0], want[0])

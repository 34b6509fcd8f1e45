"""Channels of an activation moved around zero before it is quantized."""

from __future__ import annotations

import numpy as np
import pytest
from support import apply, missed, ops, parse, rewritten, run

from xform.passes.integer import QuantizeStatic, ShiftChannels
from xform.pipeline.channel_shifts import channel_shifts
from xform.pipeline.rounding import compensated_grouped_weights

RNG = np.random.default_rng(0)
K, N = 64, 160
TEXT = f"""g (float[16,{K}] x, float[{K},{N}] w, float[{K},{N}] v, float[{N}] b)
    => (float[16,{N}] y, float[16,{N}] z, float[16,{K}] r) {{
    t = Tanh(x) m = MatMul(t, w) y = Add(b, m) z = MatMul(t, v) r = Neg(t) }}"""
FEEDS = {"x": RNG.standard_normal((16, K)).astype(np.float32)}
WEIGHTS = {name: RNG.standard_normal((K, N)).astype(np.float32) for name in ("w", "v")} | {
    "b": RNG.standard_normal(N).astype(np.float32)
}
SHIFTS = {"t": RNG.uniform(-3, 3, K)}


def test_products_give_the_same_and_the_shift_joins_a_bias() -> None:
    model, _ = rewritten(TEXT, WEIGHTS, FEEDS, ShiftChannels(SHIFTS), rtol=1e-3, atol=1e-4)
    assert sorted(ops(model)) == ["Add", "Add", "MatMul", "MatMul", "Neg", "Sub", "Tanh"]  # no Add beside the bias
    assert len({n.metadata_props["xform.origin"] for n in model.graph if n.op_type == "MatMul"}) == 2
    negated = next(n for n in model.graph if n.op_type == "Neg").inputs[0]
    assert negated is not None and negated.name == "t"  # whatever else reads the activation is left alone


@pytest.mark.parametrize(
    "tail",
    [
        "u = MatMul(t, w) y = Add(u, x)",  # a residual is no bias
        "u = MatMul(t, w) s = Add(u, b) n = Neg(u) y = Add(s, n)",  # somebody else reads the product
    ],
)
def test_other_sums_are_left_alone(tail: str) -> None:
    square = {"w": RNG.standard_normal((K, K)).astype(np.float32), "b": RNG.standard_normal(K).astype(np.float32)}
    text = f"g (float[16,{K}] x, float[{K},{K}] w, float[{K}] b) => (float[16,{K}] y) {{ t = Tanh(x) {tail} }}"
    model, _ = rewritten(text, square, FEEDS, ShiftChannels(SHIFTS), rtol=1e-3, atol=1e-4)
    assert ops(model).count("Add") == 1 + tail.count("Add") and ops(model).count("Sub") == 1


def test_activations_without_shifts_stay_and_wrong_shifts_are_told() -> None:
    model = parse(TEXT, WEIGHTS)
    assert len(apply(model, ShiftChannels({"other": np.ones(K)}))) == 0
    assert "do not fit t" in missed(apply(model, ShiftChannels({"t": np.ones(K - 1)})))[0]
    assert "do not fit t" in missed(apply(model, ShiftChannels({"t": np.full(K, np.inf)})))[0]
    assert ops(model).count("Sub") == 0


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_shifts_are_proposed_where_channels_lie_on_one_side_and_lower_the_error(offset: float) -> None:
    text = (
        f"g (float[64,{K}] x, float[{K}] o, float[{K},{N}] w) => (float[64,{N}] y) {{ t = Add(x, o) y = MatMul(t, w) }}"
    )
    weight = RNG.standard_normal((K, N))
    offsets = offset * RNG.choice([-1.0, 1.0], K)
    # the constant part of the product is nothing to measure an error by
    weight -= np.outer(offsets, offsets @ weight) / max(float(offsets @ offsets), 1.0)
    given = {"o": offsets.astype(np.float32), "w": weight.astype(np.float32)}
    feeds = {"x": RNG.standard_normal((64, K)).astype(np.float32)}
    shifts = channel_shifts(parse(text, given), [feeds], 32)
    if offset == 0.0:
        assert shifts == {}
        return
    assert set(shifts) == {"t"} and np.abs(shifts["t"] - offsets).max() < 1.5
    expected, errors = run(parse(text, given), feeds)[0], []
    for passes in ((), (ShiftChannels(shifts),)):
        model = parse(text, given)
        apply(model, *passes)
        codes = compensated_grouped_weights(model, [feeds], 32)
        assert len(codes) == 1
        apply(model, QuantizeStatic({}, products="grouped", group=32, smallest=0, codes=codes))
        errors.append(float(np.linalg.norm(run(model, feeds)[0] - expected) / np.linalg.norm(expected)))
    assert errors[1] < errors[0] / 1.5
    assert channel_shifts(parse(text, given), [feeds], 48) == {}  # does not divide the channels

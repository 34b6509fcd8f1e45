"""Channels of an activation scaled before it is quantized."""

from __future__ import annotations

import numpy as np
import pytest
from support import apply, missed, ops, parse, rewritten, run

from xform.passes.integer import QuantizeProducts, ScaleChannels
from xform.pipeline.channel_factors import channel_factors

RNG = np.random.default_rng(0)
K, N = 128, 96
TEXT = f"""g (float[16,{K}] x, float[{K},{N}] w, float[{K},{N}] v)
    => (float[16,{N}] y, float[16,{N}] z, float[16,{K}] r) {{
    t = Tanh(x) y = MatMul(t, w) z = MatMul(t, v) r = Neg(t) }}"""
FEEDS = {"x": RNG.standard_normal((16, K)).astype(np.float32)}
WEIGHTS = {name: RNG.standard_normal((K, N)).astype(np.float32) for name in ("w", "v")}
FACTORS = {"t": RNG.uniform(0.1, 10, K)}


def test_products_give_the_same_and_whatever_else_reads_the_activation_is_left_alone() -> None:
    model, _ = rewritten(TEXT, WEIGHTS, FEEDS, ScaleChannels(FACTORS), rtol=1e-3, atol=1e-4)
    assert sorted(ops(model)) == ["MatMul", "MatMul", "Mul", "Neg", "Tanh"]  # one Mul for both products
    products = [n for n in model.graph if n.op_type == "MatMul"]
    assert len({n.metadata_props["xform.origin"] for n in products}) == 2
    negated = next(n for n in model.graph if n.op_type == "Neg").inputs[0]
    assert negated is not None and negated.name == "t"


def test_activations_without_factors_stay_and_wrong_factors_are_told() -> None:
    model = parse(TEXT, WEIGHTS)
    assert len(apply(model, ScaleChannels({"other": np.ones(K)}))) == 0
    assert "do not fit t" in missed(apply(model, ScaleChannels({"t": np.ones(K - 1)})))[0]
    assert "do not fit t" in missed(apply(model, ScaleChannels({"t": np.zeros(K)})))[0]
    assert ops(model).count("Mul") == 0


@pytest.mark.parametrize("gain", [1.0, 60.0])
def test_factors_are_proposed_where_a_channel_stands_out_and_lower_the_error(gain: float) -> None:
    size = np.ones(K, np.float32)
    size[5] = gain
    text = (
        f"g (float[16,{K}] x, float[{K}] g, float[{K},{N}] w) => (float[16,{N}] y) {{ t = Mul(x, g) y = MatMul(t, w) }}"
    )
    weight = WEIGHTS["w"].copy()
    weight[5] /= gain
    model = parse(text, {"g": size, "w": weight})
    factors = channel_factors(model, [FEEDS])
    if gain == 1.0:
        assert factors == {}
        return
    assert set(factors) == {"t"} and factors["t"].shape == (K,) and factors["t"].argmax() == 5
    expected, errors = run(model, FEEDS)[0], []
    for passes in ((), (ScaleChannels(factors),)):
        one = parse(text, {"g": size, "w": weight})
        apply(one, *passes, QuantizeProducts())
        errors.append(np.linalg.norm(run(one, FEEDS)[0] - expected) / np.linalg.norm(expected))
    assert errors[1] < errors[0] / 4

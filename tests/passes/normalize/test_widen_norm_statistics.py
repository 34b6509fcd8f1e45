from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support import applied, declared, parse

from xform.passes.normalize import WidenNormStatistics
from xform.rewrite.passes import PassContext

HALF, SINGLE = int(ir.DataType.FLOAT16), int(ir.DataType.FLOAT)
ONES = {"s": np.ones(64, np.float16)}


def widen(body: str, constants: dict[str, np.ndarray] = ONES, input_bound: float | None = None, dtype: str = "float16"):
    text = f"g ({dtype}[4,64] x) => ({dtype}[4,64] y) {{ {body} }}"
    model = parse(declared(text, constants), constants)
    context = PassContext()
    changed = WidenNormStatistics(input_bound).run(model, context)
    again = PassContext()
    assert not WidenNormStatistics(input_bound).run(model, again)
    stash = [n.attributes["stash_type"].value for n in model.graph if "stash_type" in n.attributes]
    assert changed == (applied(context.remarks, "widen") > 0)
    return stash, [r.reason for r in context.remarks if r.reason]


@pytest.mark.parametrize("norm", ["LayerNormalization", "RMSNormalization"])
def test_unknown_inputs_get_wide_statistics(norm: str) -> None:
    stash, reasons = widen(f"y = {norm}<axis=-1, stash_type={HALF}>(x, s)")
    assert stash == [SINGLE]
    assert "has no bound" in reasons[0]


def test_what_is_proven_to_fit_stays() -> None:
    body = f"y = RMSNormalization<axis=-1, stash_type={HALF}>(x, s)"
    assert widen(body, input_bound=31.9)[0] == [HALF]
    stash, reasons = widen(body, input_bound=32.0)
    assert stash == [SINGLE]
    assert reasons == ["the sum of squares may reach 6.55e+04, float16 ends at 65504: statistics in float32"]


def test_bounds_come_through_the_network() -> None:
    body = f"t = Tanh(x)\n m = MatMul(t, w)\n y = RMSNormalization<axis=-1, stash_type={HALF}>(m, s)"
    small = {**ONES, "w": np.full((64, 64), 0.4, np.float16)}
    assert widen(body, small)[0] == [HALF]
    large = {**ONES, "w": np.full((64, 64), 0.6, np.float16)}
    assert widen(body, large)[0] == [SINGLE]


def test_float32_statistics_and_other_types_stay() -> None:
    assert widen(f"y = RMSNormalization<axis=-1, stash_type={SINGLE}>(x, s)") == ([SINGLE], [])
    ones = {"s": np.ones(64, np.float32)}
    body = f"y = RMSNormalization<axis=-1, stash_type={HALF}>(x, s)"
    assert widen(body, ones, dtype="float") == ([HALF], [])


def test_what_overflowed_in_float16_does_not_any_more() -> None:
    x = np.full(64, 40.0, np.float16)
    with np.errstate(over="ignore"):
        assert np.isinf(np.sum(x * x, dtype=np.float16))
    assert np.isfinite(np.sum(x.astype(np.float32) ** 2))

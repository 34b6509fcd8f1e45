"""GELU by tanh."""

from __future__ import annotations

import numpy as np
from support import apply, parse, run

from xform.graph.values import attribute
from xform.passes.integer import ApproximateGelu


def test_it_is_as_near_as_the_page_says_everywhere() -> None:
    x = np.linspace(-20, 20, 200_001, dtype=np.float32)
    model = parse(f"g (float[{len(x)}] x) => (float[{len(x)}] y) {{ y = Gelu(x) }}")
    (exact,) = run(model, {"x": x})
    log = apply(model, ApproximateGelu())
    (found,) = run(model, {"x": x})
    assert log.count("applied", "gelu") == 1
    assert 4.7e-4 < np.abs(found - exact).max() < 4.75e-4


def test_other_forms_and_types_stay() -> None:
    model = parse("""g (float[4] x, double[4] z) => (float[4] y, double[4] w) {
        y = Gelu<approximate="tanh">(x) w = Gelu(z) }""")
    log = apply(model, ApproximateGelu())
    assert len(log) == 0
    assert [attribute(n, "approximate", "none") for n in model.graph] == ["tanh", "none"]

"""GELU by tanh and by a polynomial."""

from __future__ import annotations

import numpy as np
import pytest
from support import apply, parse, run

from xform.errors import UsageError
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


def test_the_polynomial_is_as_near_and_ends_where_gelu_does() -> None:
    x = np.linspace(-20, 20, 200_001, dtype=np.float32)
    model = parse(f"g (float[{len(x)}] x) => (float[{len(x)}] y) {{ y = Gelu(x) }}")
    (exact,) = run(model, {"x": x})
    log = apply(model, ApproximateGelu("polynomial"))
    (found,) = run(model, {"x": x})
    assert log.count("applied", "gelu") == 1 and not any(node.op_type == "Gelu" for node in model.graph)
    assert 4.7e-4 < np.abs(found - exact).max() < 4.76e-4
    beyond = np.abs(x) > 6
    assert (np.abs(found - exact)[beyond] <= 3e-7 * np.abs(x[beyond])).all()
    large = np.array([-3e4, -100.0, 0.0, 100.0, 3e4, np.inf], np.float32)
    model = parse("g (float[6] x) => (float[6] y) { y = Gelu(x) }")
    apply(model, ApproximateGelu("polynomial"))
    (found,) = run(model, {"x": large})
    np.testing.assert_allclose(found, np.maximum(large, 0), rtol=3e-7, atol=1e-2)


def test_a_form_that_does_not_exist_is_refused() -> None:
    model = parse("g (float[4] x) => (float[4] y) { y = Gelu(x) }")
    with pytest.raises(UsageError, match="'tanh' or 'polynomial', not 'erf'"):
        apply(model, ApproximateGelu("erf"))  # type: ignore[arg-type]

from __future__ import annotations

import numpy as np
import pytest
from support import declared, floats, parse, run

from xform.graph.bounds import bounds

CONSTANTS = {
    "w": floats(6, 6),
    "b": floats(6),
    "s": floats(6),
    "kernel": floats(4, 2, 3, 3),
    "two": np.array(2, np.float32),
}


def _bound(text: str, name: str = "y", inputs: float = 3.0) -> tuple[float, float]:
    """The bound of a value, and the largest magnitude that random inputs within the bound reach."""
    used = {k: v for k, v in CONSTANTS.items() if k in text}
    model = parse(declared(text, used), used)
    found = bounds(model.graph, inputs)
    rng = np.random.default_rng(0)
    reached = 0.0
    for _ in range(20):
        feeds = {
            v.name: np.clip(4 * rng.standard_normal([d if isinstance(d, int) else 1 for d in v.shape]), -inputs, inputs)
            for v in model.graph.inputs
        }
        results = run(model, {k: a.astype(np.float32) for k, a in feeds.items()})
        reached = max(reached, float(np.abs(results[0]).max()))
    value = next(o for n in model.graph for o in n.outputs if o.name == name)
    return found[value], reached


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul(x, w)",
        "m = MatMul(x, w)\n y = Add(m, b)",
        "y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)",
        "y = LayerNormalization<axis=-1>(x, s, b)",
        "y = RMSNormalization<axis=-1>(x, s)",
        "y = Softmax<axis=-1>(x)",
        "a = Tanh(x)\n y = Mul(a, x)",
        "a = Transpose<perm=[1,0]>(x)\n c = Transpose<perm=[1,0]>(a)\n y = Sub(c, x)",
        "y = Gelu(x)",
        "y = Div(x, two)",
        "a = Sigmoid(x)\n y = Concat<axis=0>(a, x)",
    ],
)
def test_no_input_within_the_bound_exceeds_what_was_proven(body: str) -> None:
    rows = 8 if "Concat" in body else 4
    bound, reached = _bound(f"g (float[4,6] x) => (float[{rows},6] y) {{ {body} }}")
    assert reached <= bound * (1 + 1e-5)
    assert bound < 60 * max(reached, 1), "a bound that says nothing"


def test_convolutions() -> None:
    bound, reached = _bound("g (float[1,2,5,5] x) => (float[1,4,3,3] y) { y = Conv(x, kernel) }")
    assert reached <= bound < 20 * reached


def test_what_is_not_understood_has_no_bound() -> None:
    assert _bound("g (float[4,6] x) => (float[4,6] y) { y = Exp(x) }")[0] == np.inf
    assert _bound("g (float[4,6] x) => (float[4,6] y) { y = Div(x, x) }")[0] == np.inf
    assert _bound("g (float[4,6] x) => (float[4,6] y) { y = Relu(x) }", inputs=5.0)[0] == 5.0


def test_integer_inputs_have_none() -> None:
    model = parse("g (int64[4] x) => (float[4] y) { y = Cast<to=1>(x) }")
    assert bounds(model.graph, 1.0)[model.graph.outputs[0]] == np.inf

"""Which products count as projections of an attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support import declared, parse

from xform.pipeline.attention_products import attention_products

RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((32, 32)).astype(np.float32) for name in ("wq", "wk", "wv")}
CONSTANTS = {
    **WEIGHTS,
    "packed": RNG.standard_normal((32, 96)).astype(np.float32),
    "bias": RNG.standard_normal(32).astype(np.float32),
    "sizes": np.array([32, 32, 32]),
}
THREE = "q = MatMul(x, wq) k0 = MatMul(x, wk) k = Add(k0, bias) v0 = MatMul(x, wv) v = Add(bias, v0)"
BODIES = {
    "three": (THREE, ("q", "k0", "v0")),
    "packed": ("p = MatMul(x, packed) q, k, v = Split<axis=-1>(p, sizes)", ("p",)),
    "cross": (THREE.replace("MatMul(x, wq)", "MatMul(z, wq)"), None),
    "no product": (THREE.replace("MatMul(x, wq)", "Tanh(x)"), None),
    "more than a bias": (THREE.replace("Add(bias, v0)", "Add(z, v0)"), None),
    "normed": (THREE.replace("q = MatMul(x, wq)", "n = MatMul(x, wq) q = Tanh(n)"), None),
}


def attention(body: str) -> ir.Model:
    text = f"""g (float[2,5,32] x, float[2,5,32] z) => (float[2,5,32] y) {{
        {body} y = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v) }}"""
    used = {name: array for name, array in CONSTANTS.items() if name in body}
    model = parse(declared(text, used), used)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


@pytest.mark.parametrize("case", list(BODIES))
def test_projections_of_one_input_belong_together(case: str) -> None:
    body, expected = BODIES[case]
    assert attention_products(attention(body)) == ([] if expected is None else [expected])

"""The fingerprint depends on what is computed, and on nothing else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support import floats, parse

from xform.graph.fingerprint import fingerprint

W = floats(4, 4)


def model(body: str = "h = MatMul(x, w) a = Relu(h) b = Exp(h) y = Add(a, b)", weight: np.ndarray = W) -> ir.Model:
    return parse(f"g (float[n,4] x, float[4,4] w) => (float[n,4] y) {{ {body} }}", {"w": weight})


def test_names_and_order_do_not_matter() -> None:
    renamed = model("p = MatMul(x, w) q = Exp(p) r = Relu(p) y = Add(r, q)")
    renamed.graph[0].name = "anything"
    renamed.graph.name = "other"
    assert fingerprint(renamed) == fingerprint(model())


def test_initializer_names_do_not_matter() -> None:
    other = model()
    value = other.graph.initializers.pop("w")
    value.name = "weight"
    other.graph.register_initializer(value)
    assert fingerprint(other) == fingerprint(model())


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, w) a = Relu(h) b = Exp(h) y = Add(b, a)",
        "h = MatMul(x, w) a = Relu(h) b = Exp(a) y = Add(a, b)",
        "h = MatMul(x, w) a = LeakyRelu(h) b = Exp(h) y = Add(a, b)",
        "h = MatMul(x, w) a = Relu(h) b = Exp(h) y = Add(a, b) z = Neg(h)",
    ],
)
def test_wiring_and_operators_matter(body: str) -> None:
    assert fingerprint(model(body)) != fingerprint(model())


def test_attributes_matter() -> None:
    bodies = [f"h = MatMul(x, w) y = LeakyRelu<alpha={alpha}>(h)" for alpha in ("0.1", "0.2", "0.2")]
    first, second, third = (fingerprint(model(b)) for b in bodies)
    assert first != second == third


def test_weights_matter_unless_excluded() -> None:
    other = W.copy()
    other[3, 3] += 1
    assert fingerprint(model(weight=other)) != fingerprint(model())
    assert fingerprint(model(weight=other), weights=False) == fingerprint(model(), weights=False)
    assert fingerprint(model(), weights=False) != fingerprint(model())


def test_interface_matters() -> None:
    other = model()
    other.graph.outputs[0].name = "z"
    assert fingerprint(other) != fingerprint(model())
    dynamic = model()
    dynamic.graph.inputs[0].shape = ir.Shape([2, 4])
    assert fingerprint(dynamic) != fingerprint(model())


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN])
def test_every_dtype_is_hashed(dtype: ir.DataType) -> None:
    def typed(last: int) -> str:
        one = model()
        array = np.array([1, 0, 1, last]).astype(dtype.numpy())
        value = ir.Value(name="t", const_value=ir.tensor(array, dtype=dtype), type=ir.TensorType(dtype))
        one.graph.register_initializer(value)
        one.graph.append(ir.Node("", "Cast", [value], [ir.AttrInt64("to", 1)], num_outputs=1))
        return fingerprint(one)

    assert typed(0) != typed(1)
    assert typed(1) == typed(1)


def test_subgraphs_matter() -> None:
    def branchy(operator: str) -> str:
        return fingerprint(
            parse(f"""g (float[2] x, bool c) => (float[2] y) {{
            y = If (c) <then_branch = t () => (float[2] a) {{ a = {operator}(x) }},
                        else_branch = e () => (float[2] b) {{ b = Exp(x) }}> }}""")
        )

    assert branchy("Neg") != branchy("Abs")
    assert branchy("Neg") == branchy("Neg")

"""Squeeze and excitation: what stays in ONNX Runtime's blocked layout, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from xform.backends import LoadOptions, LowerOptions, get_backend
from xform.graph.clone import SOURCE_OPSET
from xform.graph.shapes import infer_shapes
from xform.target import Target

CPU = Target("cpu")
RNG = np.random.default_rng(0)
C = R = 16  # multiples of the blocks, which are 8 channels wide with AVX2 and 16 with AVX-512
CONSTANTS = {
    "w": (C, C, 3, 3), "v": (R, C, 1, 1), "vb": (R,), "u": (C, R, 1, 1), "ub": (C,), "p": (R, C, 1, 1),
}  # fmt: skip
BODY = """
    x0 = Conv<pads=[1,1,1,1]>(x, w) x1 = {activation}(x0)
    m = ReduceMean(x1, axes)
    h = Conv(m, v, vb) hr = Relu(h) s0 = Conv(hr, u, ub) s = Sigmoid(s0)
    o = {product}
    y = Conv(o, p)"""


def make(body: str, shape: str = "2,16,7,5", opset: int = 18, more: str = "", **arrays: Any) -> ir.Model:
    dims = shape.split(",")
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[{shape}] x{more}) => (float[{dims[0]},{R},{",".join(dims[2:])}] y) {{ {body} }}""")
    given = {k: RNG.standard_normal(s).astype(np.float32) / 4 for k, s in CONSTANTS.items()}
    given = {"axes": np.array([2, 3]), **given, **arrays}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, k) for k, a in given.items() if f"{k})" in body
                                   or f" {k}," in body)  # fmt: skip
    model = ir.from_proto(proto)
    infer_shapes(model)
    model.meta[SOURCE_OPSET] = opset
    return model


def lower(model: ir.Model, feeds: dict[str, Any], **options: Any) -> tuple[ir.Model, dict[str, int]]:
    """Lowered, with the numbers compared."""
    backend = get_backend(None, CPU)
    artifact = backend.lower(model, CPU, LowerOptions(**options))
    runner = backend.load(artifact, LoadOptions(threads=1))
    plain = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for got, want in zip(runner.run(feeds), plain.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    return artifact.model, artifact.metadata["lowered"]  # type: ignore[attr-defined]


def feeds(*shape: int) -> dict[str, Any]:
    return {"x": RNG.standard_normal(shape).astype(np.float32)}


def reorders(model: ir.Model, folder: Path) -> int:
    """Changes of layout between the input and the output in what ONNX Runtime executes."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return sum(node.op_type.startswith("Reorder") for node in nodes)


@pytest.mark.parametrize("product", ["Mul(x1, s)", "Mul(s, x1)"])
@pytest.mark.parametrize(("activation", "opset"), [("Relu", 13), ("Relu", 18), ("HardSwish", 18), ("Gelu", 20)])
def test_gate_stays_blocked(product: str, activation: str, opset: int, tmp_path: Path) -> None:
    model = make(BODY.format(product=product, activation=activation), opset=opset)
    result, forms = lower(model, feeds(2, 16, 7, 5))
    assert forms["channel gate: Resize"] == forms["spatial mean: GlobalAveragePool"] == 1
    assert result.opset_imports[""] == opset
    assert reorders(result, tmp_path) <= 2 < reorders(lower(model, feeds(2, 16, 7, 5), portable=True)[0], tmp_path)


def test_dynamic_batch() -> None:
    _, forms = lower(make(BODY.format(product="Mul(x1, s)", activation="Relu"), "n,16,7,5"), feeds(3, 16, 7, 5))
    assert forms["channel gate: Resize"] == 1


@pytest.mark.parametrize(
    ("product", "activation", "shape", "options"),
    [
        ("Mul(x1, s)", "Relu", "2,16,h,w", {}),  # the factors are unknown
        ("Mul(x1, s)", "Softplus", "2,16,7,5", {}),  # has no blocked form
        ("Mul(x1, s)", "Relu", "2,16,7,5", {"portable": True}),
        ("Mul(x1, s)", "Relu", "2,16,7,5", {"opset": 12}),
        ("Add(x1, s)", "Relu", "2,16,7,5", {}),
        ("Mul(x1, s) q = Softplus(o)", "Relu", "2,16,7,5", {}),  # no convolution reads the product
        ("Mul(x1, x1)", "Relu", "2,16,7,5", {}),
    ],
)
def test_gates_left_alone(product: str, activation: str, shape: str, options: dict[str, Any]) -> None:
    body = BODY.format(product=product, activation=activation)
    body = body.replace("Conv(o", "Conv(q") if "q =" in product else body
    _, forms = lower(make(body, shape), feeds(2, 16, 7, 5), **options)
    assert "channel gate: Resize" not in forms


@pytest.mark.parametrize(
    ("source", "axes", "taken"), [("x1", [-1, -2], True), ("x1", [2], False), ("x", [2, 3], False)]
)
def test_means(source: str, axes: list[int], taken: bool) -> None:
    body = f"x0 = Conv<pads=[1,1,1,1]>(x, w) x1 = Relu(x0) m = ReduceMean({source}, axes) n = Add(x1, m) y = Conv(n, p)"
    _, forms = lower(make(body, axes=np.array(axes)), feeds(2, 16, 7, 5))
    assert ("spatial mean: GlobalAveragePool" in forms) == taken

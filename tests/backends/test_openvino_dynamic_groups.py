"""Products whose inputs OpenVINO rounds itself, by groups of channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import apply, declared, ops, parse, run

from xform.backends import Artifact, LoadOptions, LowerOptions, get_backend
from xform.graph.clone import clone
from xform.passes.integer import QuantizeStatic
from xform.target import Target

ov = pytest.importorskip("openvino")
CPU = Target("cpu", threads=1)
RNG = np.random.default_rng(0)
SETTING = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
TEXT = """g (float[b,20,64] x) => (float[b,20,64] y) {
    r = Reshape(x, s) m = MatMul(r, w) n = Relu(m) o = MatMul(n, v) y = Reshape(o, t) }"""


def constants() -> dict[str, np.ndarray]:
    w, v = (RNG.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    return {"w": w, "v": v, "s": np.array([-1, 64]), "t": np.array([-1, 20, 64])}


def grouped(**options: Any) -> tuple[ir.Model, ir.Model]:
    """In float, and by groups."""
    given = constants()
    exact = parse(declared(TEXT, given), given)
    for node, name in zip([n for n in exact.graph if n.op_type == "MatMul"], ("first", "second"), strict=True):
        node.name = name
    model = clone(exact)
    apply(model, QuantizeStatic({}, products="grouped", group=32, smallest=0, **options))
    return exact, model


def _same(model: ir.Model, artifact: Artifact) -> None:
    """What OpenVINO computes is what the graph says, on any processor."""
    x = (RNG.standard_normal((2, 20, 64)) * np.exp(RNG.standard_normal((2, 20, 1)))).astype(np.float32)
    (found,) = get_backend("openvino", CPU).load(artifact, LoadOptions(threads=1)).run({"x": x})
    expected = run(model, {"x": x})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_the_rounding_is_left_to_the_runtime() -> None:
    exact, model = grouped()
    assert ops(model).count("QuantizeLinear") == 2
    backend = get_backend("openvino", CPU)
    artifact = backend.lower(model, CPU, LowerOptions())
    kinds = artifact.metadata["operators"]
    assert "QuantizeLinear" not in kinds and "Abs" not in kinds
    assert kinds["Sub"] == 2  # scales of weights by blocks, as opset 20 has them
    assert artifact.metadata["session"][SETTING] == 32
    (choice,) = artifact.choices
    assert choice.applied and choice.nodes == ("first", "second") and "groups of 32 channels" in choice.reason
    assert ops(model).count("QuantizeLinear") == 2  # the caller's graph is left as it is
    x = (RNG.standard_normal((2, 20, 64)) * np.exp(RNG.standard_normal((2, 20, 1)))).astype(np.float32)
    expected, meant = run(exact, {"x": x})[0], run(model, {"x": x})[0]
    found = backend.load(artifact, LoadOptions(threads=1)).run({"x": x})[0]
    size = np.linalg.norm(expected)
    error = np.linalg.norm(meant - expected) / size
    assert 0.001 < error < 0.02
    # where the processor has no dot-product instructions only the weights are rounded, which is closer
    assert np.linalg.norm(found - meant) / size < 1e-5 or np.linalg.norm(found - expected) / size < error


def test_it_is_off_without_groups() -> None:
    exact, _ = grouped()
    artifact = get_backend("openvino", CPU).lower(exact, CPU, LowerOptions())
    assert artifact.metadata["session"][SETTING] == 0 and artifact.choices == []


def test_int8_weights_with_a_float_input_keep_all_as_it_is_written() -> None:
    _, model = grouped(keep=("second",))
    codes = RNG.integers(-127, 127, (64, 64)).astype(np.int8)
    given = {"q": codes, "scale": np.full(64, 0.01, np.float32)}
    text = "g (float[3,64] z) => (float[3,64] u) { d = DequantizeLinear<axis=1>(q, scale) u = MatMul(z, d) }"
    other = parse(declared(text, given), given)
    decode, product = list(other.graph)
    for value in list(other.graph.initializers.values()):
        other.graph.initializers.pop(value.name)
        model.graph.register_initializer(value)
    other.graph.remove([decode, product])
    last = next(node for node in model.graph if node.op_type == "MatMul" and node.inputs[1] is not None
                and node.inputs[1].name == "v")  # fmt: skip
    model.graph.insert_before(last, decode)
    last.replace_input_with(1, decode.outputs[0])
    artifact = get_backend("openvino", CPU).lower(model, CPU, LowerOptions())
    (choice,) = artifact.choices
    assert not choice.applied and "second reads an int8 weight and a float input" in choice.reason
    assert artifact.metadata["session"][SETTING] == 0 and artifact.metadata["operators"]["Round"] == 1
    _same(model, artifact)


def test_one_setting_serves_one_group_alone() -> None:
    _, model = grouped(keep=("second",))
    apply(model, QuantizeStatic({}, products="grouped", group=16, smallest=0))
    artifact = get_backend("openvino", CPU).lower(model, CPU, LowerOptions())
    (choice,) = artifact.choices
    assert not choice.applied and "groups of [16, 32] channels" in choice.reason
    assert artifact.metadata["session"][SETTING] == 0 and artifact.metadata["operators"]["Round"] == 2
    _same(model, artifact)


def test_the_setting_is_in_the_file(tmp_path: Path) -> None:
    _, model = grouped()
    artifact = get_backend("openvino", CPU).lower(model, CPU, LowerOptions())
    artifact.save(tmp_path / "m.xml")
    compiled = ov.Core().compile_model(tmp_path / "m.xml", "CPU")
    assert int(compiled.get_property(SETTING)) == 32
    artifact.save(tmp_path / "m.onnx")
    properties = ir.load(tmp_path / "m.onnx").metadata_props
    assert json.loads(properties["xform.session"]) == artifact.metadata["session"]

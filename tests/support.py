"""What many tests share: models from text, runs, and passes applied with every check that a rewrite must pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from xform.graph.check import Interface, check
from xform.graph.shapes import infer_shapes
from xform.rewrite.passes import Pass, PassContext
from xform.rewrite.remarks import RemarkLog

RNG = np.random.default_rng(0)


def parse(text: str, constants: Mapping[str, np.ndarray] | None = None, opset: int = 23) -> ir.Model:
    """A model from ONNX text (the graph alone); `constants` turns inputs of those names into initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> {text}')
    model = ir.from_proto(proto)
    for value in list(model.graph.inputs):
        if constants and value.name in constants:
            model.graph.inputs.remove(value)
            tensor = ir.tensor(np.asarray(constants[value.name]), name=value.name)
            value.const_value, value.shape, value.dtype = tensor, ir.Shape(tensor.shape), tensor.dtype
            model.graph.register_initializer(value)
    infer_shapes(model)
    return model


def declared(text: str, constants: Mapping[str, np.ndarray]) -> str:
    """ONNX text with `constants` added to the graph's inputs, where `parse` looks for them."""
    types = {"float32": "float", "float64": "double"}  # the other names are those of NumPy
    arrays = {name: np.asarray(constant) for name, constant in constants.items()}
    given = [f"{types.get(a.dtype.name, a.dtype.name)}[{','.join(map(str, a.shape))}] {n}" for n, a in arrays.items()]
    head, tail = text.split(")", 1)
    return f"{head}{', ' if given and not head.endswith('(') else ''}{', '.join(given)}){tail}"


def run(model: ir.Model, feeds: Mapping[str, np.ndarray], optimized: bool = False) -> list[np.ndarray]:
    """Outputs in ONNX Runtime, its own graph optimizations off unless `optimized`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def apply(model: ir.Model, *passes: Pass) -> RemarkLog:
    """Run passes in order; the structure must stay sound, checker-clean, and the interface unchanged."""
    before = Interface.of(model)
    context = PassContext()
    for one in passes:
        one.run(model, context)
        assert check(model) == []
    assert before.difference(Interface.of(model)) is None
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return context.remarks


def rewritten(
    text: str,
    constants: Mapping[str, np.ndarray],
    feeds: Mapping[str, np.ndarray],
    *passes: Pass,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    opset: int = 23,
) -> tuple[ir.Model, RemarkLog]:
    """Parse, apply `passes`, and demand the same numbers before and after; re-running must change nothing."""
    model = parse(text, constants, opset)
    expected = run(model, feeds)
    remarks = apply(model, *passes)
    for got, want in zip(run(model, feeds), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    again = PassContext()
    assert not any(one.run(model, again) for one in passes), "a second run changed the graph"
    return model, remarks


def ops(model: ir.Model) -> list[str]:
    """Operator types in order."""
    return [n.op_type for n in model.graph]


def applied(remarks: RemarkLog, rule: str) -> int:
    """How often a rule fired."""
    return sum(r.rule == rule and r.verdict == "applied" for r in remarks)


def missed(remarks: RemarkLog) -> list[str]:
    """Reasons of missed remarks."""
    return [r.reason for r in remarks if r.verdict == "missed"]


def floats(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Random normal numbers."""
    return RNG.standard_normal(shape).astype(dtype)

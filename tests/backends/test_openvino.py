"""The OpenVINO backend: lowering, running, saving, refusing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support import parse

import xform
from xform.backends import Artifact, LoadOptions, LowerOptions, get_backend
from xform.errors import KernelError, TargetError, UsageError
from xform.target import Target

ov = pytest.importorskip("openvino")
CPU = Target("cpu", threads=1)
ADD = "g (float[b,3] x, float[b,3] y) => (float[b,3] total, float[b,3] x2) { total = Add(x, y) x2 = Add(x, x) }"


def lowered(graph: str) -> Artifact:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {graph}')
    return get_backend("openvino", CPU).lower(ir.from_proto(proto), CPU, LowerOptions())


def load(graph: str) -> Any:
    return get_backend("openvino", CPU).load(lowered(graph), LoadOptions(threads=1))


def test_arrays_and_tensors_come_back_as_they_went_in() -> None:
    runner = load(ADD)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    total, doubled = runner.run({"y": 2 * x, "x": x})
    np.testing.assert_array_equal(total, 3 * x)
    np.testing.assert_array_equal(doubled, 2 * x)
    assert list(runner.output_names) == ["total", "x2"]
    tensors = runner.run({"x": torch.from_numpy(x).T.contiguous().T, "y": torch.from_numpy(x)})
    assert all(isinstance(t, torch.Tensor) for t in tensors)


def test_a_result_outlives_the_next_call() -> None:
    runner = load(ADD)
    one, two = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    first = runner.run({"x": one, "y": one})[0]
    runner.run({"x": two, "y": two})
    np.testing.assert_array_equal(first, 2 * one)


def test_an_input_that_nothing_reads_is_accepted() -> None:
    runner = load("g (float[2] x, float[2] unused) => (float[2] y) { y = Neg(x) }")
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(runner.run({"x": x, "unused": x})[0], -x)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.ones((2, 3), np.float32)}, "'y' is missing"),
        ({"x": np.ones((2, 3), np.float32), "y": np.ones((2, 3))}, "'y' is float64"),
        ({"x": np.ones((2, 4), np.float32), "y": np.ones((2, 4), np.float32)}, "axis 1 is fixed"),
        ({"x": np.ones(3, np.float32), "y": np.ones(3, np.float32)}, "has shape"),
        ({"z": np.ones(3, np.float32)}, "no input named"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(ADD).run(feeds)


def test_a_closed_runner_says_so() -> None:
    runner = load(ADD)
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.run({})


def test_dtypes_that_it_lacks_are_refused_by_name() -> None:
    with pytest.raises(TargetError, match="'x' has string"):
        lowered("g (string[2] x) => (string[2] y) { y = Identity(x) }")


def test_an_operator_that_it_lacks_is_refused_by_name() -> None:
    artifact = lowered("g (float[2] x) => (float[2] y) { y = Bernoulli <seed = 1.0> (x) }")
    with pytest.raises(TargetError, match="Bernoulli"):
        get_backend("openvino", CPU).load(artifact, LoadOptions())


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_what_is_saved_runs_without_xform(tmp_path: Path, suffix: str) -> None:
    files = lowered(ADD).save(tmp_path / f"m{suffix}")
    assert [f.name for f in files] == (["m.onnx"] if suffix == ".onnx" else ["m.xml", "m.bin"])
    compiled = ov.Core().compile_model(files[0], "CPU")
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(compiled({"x": x, "y": x})["total"], 2 * x)


def test_a_transformer_block_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu").eval()
    fast = xform.optimize(layer, "cpu", backend="openvino", inputs=torch.randn(2, 9, 64))
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)
    assert fast.report.backend == "openvino"
    assert fast.report.artifact["session"]["INFERENCE_PRECISION_HINT"] == "f32"


def test_float64_is_told_to_be_computed_in_float32() -> None:
    model = parse("g (double[N,4] x) => (double[N,4] y) { y = Tanh(x) }")
    with pytest.warns(xform.XformWarning, match="computes float64 in float32"):
        result = xform.optimize(ir.to_proto(model), backend="openvino", verify="off")
    assert any("float64" in warning for warning in result.report.warnings)


def test_bfloat16_is_refused_with_a_backend_that_runs_it() -> None:
    model = parse("g (bfloat16[N,4] x) => (bfloat16[N,4] y) { y = Erf(x) }")
    with pytest.raises(TargetError) as openvino:
        xform.optimize(ir.to_proto(model), backend="openvino")
    with pytest.raises(KernelError, match="no kernel for Erf in bfloat16") as runtime:
        xform.optimize(ir.to_proto(model), backend="onnxruntime")
    assert runtime.value.operator == "Erf" and runtime.value.dtype == "bfloat16"
    for error in (openvino.value, runtime.value):
        assert "torch_triton" in (error.hint or "") and "onnxruntime" not in (error.hint or "")
    assert xform.optimize(ir.to_proto(model), backend="torch_triton").report.verification.passed

"""Choosing a backend, loading an artifact, and calling it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from xform.backends import Artifact, LoadOptions, LowerOptions, Runner, get_backend
from xform.backends.onnxruntime import available
from xform.backends.onnxruntime.session import SessionSettings, physical_cores
from xform.errors import TargetError, UsageError
from xform.target import Target

CPU = Target("cpu")
ADD = "g (float[b,3] x, float[b,3] y) => (float[b,3] total, float[b,3] x2) { total = Add(x, y) x2 = Add(x, x) }"


def artifact_of(graph: str) -> Artifact:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {graph}')
    return get_backend(None, CPU).lower(ir.from_proto(proto), CPU, LowerOptions())


def load(graph: str) -> Runner:
    return get_backend(None, CPU).load(artifact_of(graph), LoadOptions(threads=1))


def test_the_default_backend_of_the_cpu_is_onnxruntime() -> None:
    assert get_backend(None, CPU).name == "onnxruntime"


@pytest.mark.parametrize("target", ["edge", "edge:aarch64"])
def test_a_target_without_backend_is_refused_with_what_there_is(target: str) -> None:
    with pytest.raises(TargetError, match=f"no backend serves target {target}[\\s\\S]*cpu") as error:
        get_backend(None, Target.parse(target))
    assert error.value.exit_code == 7


def test_a_backend_that_does_not_serve_the_target_is_refused() -> None:
    with pytest.raises(TargetError, match="'onnxruntime' does not serve target cuda"):
        get_backend("onnxruntime", Target("cuda"))


def test_an_unknown_backend_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"'onnxrt'[\s\S]*onnxruntime"):
        get_backend("onnxrt", CPU)


def test_a_missing_package_is_refused_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"onnxruntime is not installed[\s\S]*pip install onnxruntime") as error:
        get_backend(None, CPU)
    assert error.value.exit_code == 7


def test_a_build_without_the_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["AzureExecutionProvider"])
    assert "no CPUExecutionProvider, only AzureExecutionProvider" in str(available.missing(CPU))


def test_arrays_in_give_arrays_out() -> None:
    runner = load(ADD)
    x = np.ones((2, 3), np.float32)
    total, doubled = runner.run({"y": 2 * x, "x": x})
    assert isinstance(total, np.ndarray)
    np.testing.assert_array_equal(total, 3 * x)
    np.testing.assert_array_equal(doubled, 2 * x)
    assert list(runner.input_names) == ["x", "y"] and list(runner.output_names) == ["total", "x2"]


def test_tensors_in_give_tensors_out_whatever_their_layout() -> None:
    runner = load(ADD)
    x = torch.arange(6.0).reshape(3, 2).T.requires_grad_()
    total, doubled = runner.run({"x": x, "y": torch.ones(2, 3)})
    assert isinstance(total, torch.Tensor) and not total.requires_grad
    torch.testing.assert_close(total, x.detach() + 1)
    torch.testing.assert_close(doubled, 2 * x.detach())


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.ones((2, 3), np.float32)}, "'y' is missing"),
        ({n: np.ones((2, 3), np.float32) for n in "xyz"}, "no input named 'z'"),
        ({"x": np.ones((2, 3)), "y": np.ones((2, 3), np.float32)}, "'x' is float64, the model takes float32"),
        ({"x": np.ones((2, 3, 1), np.float32), "y": np.ones((2, 3), np.float32)}, r"'x' has shape \(2, 3, 1\)"),
        ({"x": np.ones((2, 4), np.float32), "y": np.ones((2, 3), np.float32)}, "axis 1 is fixed"),
    ],
)
def test_wrong_inputs_are_usage_errors(feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(ADD).run(feeds)


def test_a_failure_of_the_runtime_says_so_without_its_traceback() -> None:
    runner = load("g (float[a] x, float[b] y) => (float[c] z) { z = Add(x, y) }")
    with pytest.raises(TargetError, match="ONNX Runtime failed"):
        runner.run({"x": np.ones(2, np.float32), "y": np.ones(3, np.float32)})


def test_a_graph_that_the_runtime_refuses_is_a_target_error() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "nowhere" : 1]> g (float[a] x) => (float[a] y) { y = nowhere.Op(x) }'
    )
    artifact = get_backend(None, CPU).lower(ir.from_proto(proto), CPU, LowerOptions())
    with pytest.raises(TargetError, match="cannot load the lowered graph") as error:
        get_backend(None, CPU).load(artifact, LoadOptions())
    assert error.value.exit_code == 7


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_bfloat16_goes_in_and_comes_out(kind: str) -> None:
    runner = load("g (bfloat16[b,2] x, int64[n] i) => (bfloat16[b,2] y, int64[n] j) { y = Identity(x) j = Neg(i) }")
    x, i = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), torch.tensor([3, 4])
    feeds: dict[str, Any] = {"x": x, "i": i}
    if kind == "numpy":
        feeds = {"x": x.float().numpy().astype(ml_dtypes.bfloat16), "i": i.numpy()}
    y, j = runner.run(feeds)
    assert str(y.dtype).endswith("bfloat16") and isinstance(y, torch.Tensor) == (kind == "torch")
    assert y.tolist() == [[1.5, -2.0]] and j.tolist() == [-3, -4]


def test_strings_and_sequences_pass() -> None:
    runner = load(
        "g (string[n] s, float[n] x) => (string[n] t, seq(float[n]) q) { t = Identity(s) q = SequenceConstruct(x, x) }"
    )
    t, q = runner.run({"s": np.array(["a", "b"]), "x": np.ones(2, np.float32)})
    assert t.tolist() == ["a", "b"] and [a.tolist() for a in q] == [[1.0, 1.0], [1.0, 1.0]]


def test_large_weights_are_lent_not_copied_and_outlive_the_caller() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[b,64] x) => (float[b,64] y) { y = Mul(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights[:1].repeat(64, 0), "w"))
    backend = get_backend(None, CPU)
    runner = backend.load(backend.lower(ir.from_proto(proto), CPU, LowerOptions()), LoadOptions(threads=1))
    del proto
    x = np.ones((64, 64), np.float32)
    np.testing.assert_array_equal(runner.run({"x": x})[0], weights[:1].repeat(64, 0))


def test_a_closed_runner_refuses_to_run() -> None:
    runner = load(ADD)
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.run({})


def test_the_session_fits_the_machine_and_is_recorded() -> None:
    artifact = artifact_of(ADD)
    get_backend(None, CPU).load(artifact, LoadOptions())
    assert artifact.metadata["session"] == {
        "intra_op_threads": physical_cores(),
        "inter_op_threads": 1,
        "graph_optimization": "all",
        "spinning": True,
        "cpu_arena": True,
        "memory_pattern": True,
    }
    assert artifact.metadata["opset"] == 23 and artifact.metadata["domains"] == ["ai.onnx"]
    options = SessionSettings(3, spinning=False, cpu_arena=False, memory_pattern=False).options()
    assert options.intra_op_num_threads == 3 and not options.enable_cpu_mem_arena and not options.enable_mem_pattern
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_the_settings_travel_with_the_saved_model(tmp_path: Path) -> None:
    artifact = artifact_of(ADD)
    saved = onnx.load(artifact.save(tmp_path / "add.onnx")[0])
    properties = {p.key: p.value for p in saved.metadata_props}
    assert json.loads(properties["xform.session"]) == artifact.metadata["session"]


def test_threads_of_the_target_count() -> None:
    backend, target = get_backend(None, CPU), Target("cpu", threads=1)
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {ADD}')
    artifact = backend.lower(ir.from_proto(proto), target, LowerOptions())
    backend.load(artifact, LoadOptions())
    assert artifact.metadata["session"]["intra_op_threads"] == 1


def test_an_artifact_is_saved_as_one_model(tmp_path: Path) -> None:
    assert artifact_of(ADD).save(tmp_path / "add.onnx") == [tmp_path / "add.onnx"]
    session = ort.InferenceSession(str(tmp_path / "add.onnx"))
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x, "y": x})[0], 2 * x)

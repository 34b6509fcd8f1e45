"""xform.optimize on ONNX models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import xform
from xform.errors import ModelError, TargetError, UsageError, VerificationError
from xform.optimized import OptimizedGraph
from xform.pipeline.presets import EXACT
from xform.rewrite.passes import Pass, PassContext

TEXT = """<ir_version: 10, opset_import: ["" : 17]>
mlp (float[batch,8] x, float[batch,8] skip) => (float[batch,8] y) {
    m = MatMul(x, w)
    h = Add(m, b)
    d = Div(h, root2)
    e = Erf(d)
    a = Add(e, one)
    g = Mul(h, a)
    act = Mul(g, half)
    s = Add(act, skip)
    y = LayerNormalization(s, scale, bias)
}"""
RNG = np.random.default_rng(0)


def proto() -> onnx.ModelProto:
    """An MLP block with an exact Gelu spelled out."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    constants: dict[str, Any] = {"w": rng.standard_normal((8, 8)), "b": rng.standard_normal(8)}
    constants |= {"scale": rng.standard_normal(8), "bias": rng.standard_normal(8)}
    constants |= {"root2": np.sqrt(2), "one": 1.0, "half": 0.5}
    for name, data in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(data, np.float32), name))
    return model


def feeds(batch: int = 3) -> dict[str, Any]:
    return {name: RNG.standard_normal((batch, 8)).astype(np.float32) for name in ("x", "skip")}


def reference(given: dict[str, Any]) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto().SerializeToString(), options).run(None, given)[0]


def sources(folder: Path) -> dict[str, Any]:
    path = folder / "mlp.onnx"
    onnx.save(proto(), path)
    return {
        "path": path,
        "text path": str(path),
        "bytes": path.read_bytes(),
        "ModelProto": proto(),
        "onnx_ir": ir.from_proto(proto()),
    }


@pytest.fixture(scope="module")
def optimized() -> OptimizedGraph:
    result = xform.optimize(proto())
    assert isinstance(result, OptimizedGraph)
    return result


@pytest.mark.parametrize("kind", ["path", "text path", "bytes", "ModelProto", "onnx_ir"])
def test_every_kind_of_model_is_taken_and_left_as_it_was(kind: str, tmp_path: Path) -> None:
    source = sources(tmp_path)[kind]
    before = (tmp_path / "mlp.onnx").read_bytes()
    result = xform.optimize(source)
    given = feeds()
    np.testing.assert_allclose(result(**given)["y"], reference(given), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "mlp.onnx").read_bytes() == before
    if kind == "ModelProto":
        assert source == proto()
    assert result.report.source == ("mlp.onnx" if "path" in kind else "mlp")


def test_the_result_is_called_by_position_by_name_or_with_a_dict(optimized: OptimizedGraph) -> None:
    given = feeds()
    expected = reference(given)
    for outputs in (optimized(given["x"], given["skip"]), optimized(**given), optimized(given)):
        assert list(outputs) == ["y"] and isinstance(outputs["y"], np.ndarray)
        np.testing.assert_allclose(outputs["y"], expected, rtol=1e-5, atol=1e-5)


def test_other_sizes_of_dynamic_dims_run(optimized: OptimizedGraph) -> None:
    for batch in (1, 7):
        given = feeds(batch)
        np.testing.assert_allclose(optimized(given)["y"], reference(given), rtol=1e-5, atol=1e-5)


def test_tensors_in_give_tensors_out(optimized: OptimizedGraph) -> None:
    given = feeds()
    output = optimized({name: torch.from_numpy(array) for name, array in given.items()})["y"]
    assert isinstance(output, torch.Tensor)
    np.testing.assert_allclose(output.numpy(), reference(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "'x' is missing"),
        ((), {"z": 0}, "no input named 'z'"),  # what was mistyped, rather than what is missing for it
        ((), {"x": 0, "skip": 0, "other": 0}, "no input named 'other'"),
        ((0, 0, 0), {}, "3 inputs were given, the model takes 2"),
        ((0,), {"x": 0, "skip": 0}, "'x' was given twice"),
    ],
)
def test_wrong_calls_are_usage_errors(
    optimized: OptimizedGraph, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        optimized(*args, **kwargs)


def test_the_report_tells_what_was_done(optimized: OptimizedGraph) -> None:
    report = optimized.report
    assert (report.target, report.preset, report.backend) == ("cpu", "exact", "onnxruntime")
    assert (report.opset_before, report.opset_after) == (17, 17)
    assert [p.name for p in report.passes] == list(EXACT)
    assert report.concepts["gelu"] == 1 and report.concepts["layer_norm"] == 1
    assert report.verification.passed is True and report.verification.random >= 2
    assert report.verification.max_rel_error is not None and report.verification.max_rel_error < 1e-5
    assert report.before is not None and report.after is not None and report.after.nodes < report.before.nodes
    assert {"capture", "passes", "verify", "lower"} <= set(report.seconds)
    assert json.loads(report.to_json())["schema"] == "xform.report/1"


def test_explain_speaks_about_a_concept_and_says_when_there_is_nothing(optimized: OptimizedGraph) -> None:
    assert optimized.explain("gelu").startswith("gelu: 1 in the result")
    assert "raise_gelu" in optimized.explain("gelu")
    assert "raise_gelu" in optimized.explain()
    assert optimized.explain("attention").startswith("attention: 0 in the result; no pass touched it")


def test_the_graph_is_the_canonical_one(optimized: OptimizedGraph) -> None:
    operators = [node.op_type for node in optimized.graph.graph]
    assert "Gelu" in operators and "Erf" not in operators


def test_saving_writes_a_model_that_runs_and_the_report_beside_it(optimized: OptimizedGraph, tmp_path: Path) -> None:
    files = optimized.save(tmp_path / "out.onnx", report=True)
    assert files == [tmp_path / "out.onnx", tmp_path / "out.report.json"]
    given = feeds()
    output = ort.InferenceSession(str(files[0])).run(None, given)[0]
    np.testing.assert_allclose(output, reference(given), rtol=1e-5, atol=1e-5)
    assert json.loads(files[1].read_text())["backend"] == "onnxruntime"
    onnx.checker.check_model(str(files[0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.report.json"]


def test_portable_and_opset_are_obeyed(tmp_path: Path) -> None:
    result = xform.optimize(proto(), portable=True, opset=13)
    saved = onnx.load(result.save(tmp_path / "out.onnx")[0])
    assert {(o.domain, o.version) for o in saved.opset_import} == {("", 13)}
    given = feeds()
    np.testing.assert_allclose(result(given)["y"], reference(given), rtol=1e-5, atol=1e-5)


def test_given_inputs_are_what_is_verified_on() -> None:
    report = xform.optimize(proto(), inputs=feeds()).report
    assert report.verification.given == 1 and report.verification.random == 0
    assert xform.optimize(proto(), inputs=[feeds(2), feeds(5)]).report.verification.passed is True
    x, skip = feeds(4).values()
    assert xform.optimize(proto(), inputs=(x, skip)).report.verification.given == 1


def test_ranges_of_dynamic_dims_are_verified_at_both_ends() -> None:
    found = xform.optimize(proto(), dynamic={"batch": (1, 5)}).report.verification
    assert found.sizes == ("batch: 1, 5",) and (found.given, found.derived) == (0, 0)
    with pytest.raises(UsageError, match="batches"):
        xform.optimize(proto(), dynamic={"batches": (1, 5)})
    with pytest.raises(UsageError, match="is not a range"):
        xform.optimize(proto(), dynamic={"batch": 5})


def test_verification_can_be_off_and_then_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(ort.InferenceSession):  # type: ignore[misc]
        def run(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("a session was run")

    with monkeypatch.context() as patched:
        patched.setattr(ort, "InferenceSession", Loaded)
        result = xform.optimize(proto(), verify="off")
    result._compiled.close()
    assert result.report.verification.mode == "off" and result.report.verification.passed is None
    given = feeds()
    np.testing.assert_allclose(result(given)["y"], reference(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": "int9"}, UsageError, "no preset 'int9'[\\s\\S]*exact"),
        ({"preset": "integer"}, UsageError, "no preset 'integer'[\\s\\S]*exact"),
        ({"passes": ["raise_gelus"]}, UsageError, "raise_gelus"),
        ({"calibration": {}}, UsageError, "every pass is exact"),
        ({"verify": "sometimes"}, UsageError, "sometimes"),
        ({"target": "tpu"}, UsageError, "unknown target 'tpu'"),
        ({"target": "edge"}, TargetError, "no backend serves target edge"),
        ({"target": "edge:aarch64"}, TargetError, "no backend serves target edge:aarch64"),
        ({"backend": "tvm"}, UsageError, "unknown backend 'tvm'"),
        ({"dynamic": "all"}, UsageError, "'all' is not known"),
        ({"inputs": {"z": np.zeros(1)}}, UsageError, "no input named 'z'"),
        ({"inputs": (0, 0, 0)}, UsageError, "3 inputs were given"),
        ({"opset": 99}, UsageError, "99"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        xform.optimize(proto(), **options)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot optimize an object of type int"):
        xform.optimize(7)  # type: ignore[arg-type]
    with pytest.raises(ModelError):
        xform.optimize(tmp_path / "missing.onnx")


class Planted(Pass):
    """Doubles the largest weight."""

    name = "planted"

    def run(self, model: ir.Model, context: PassContext) -> bool:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = ir.tensor(2 * value.const_value.numpy(), name="w")
        return True


def test_a_wrong_pass_is_rolled_back_and_named() -> None:
    given = feeds()
    result = xform.optimize(proto(), passes=["fold_constants", Planted(), "raise_gelu"])
    np.testing.assert_allclose(result(given)["y"], reference(given), rtol=1e-5, atol=1e-5)
    assert [p.status for p in result.report.passes if p.name == "planted"] == ["rolled_back"]
    assert any("planted" in warning for warning in result.report.warnings)
    assert result.report.preset == "custom"


def test_strict_raises_where_a_pass_is_wrong() -> None:
    with pytest.raises(VerificationError, match="planted"):
        xform.optimize(proto(), passes=[Planted()], strict=True)


def test_a_wrong_lowering_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from xform.backends.onnxruntime import lower

    original = lower.lower

    def wrong(graph: ir.Model, options: Any) -> Any:
        model, forms = original(graph, options)
        scale = model.graph.initializers["scale"]
        scale.const_value = ir.tensor(1.01 * scale.const_value.numpy(), name="scale")  # type: ignore[union-attr]
        return model, forms

    monkeypatch.setattr(lower, "lower", wrong)
    with pytest.raises(VerificationError, match="what backend 'onnxruntime' runs differs") as error:
        xform.optimize(proto())
    assert error.value.exit_code == 5


def test_the_package_exports_its_interface() -> None:
    assert xform.__version__ and xform.Target("cpu").kind == "cpu"
    for name in xform.__all__:
        assert getattr(xform, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = xform.nonsense


def test_a_checkout_that_is_not_installed_can_be_imported() -> None:
    program = """
from importlib import metadata
def version(name): raise metadata.PackageNotFoundError(name)
metadata.version = version
import xform
print(xform.__version__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "0+unknown", done.stderr


def test_the_runtime_reports_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    program = """
import xform
model = '<ir_version: 9, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
import onnx
xform.optimize(onnx.parser.parse_model(model))
"""
    own = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "XFORM_CACHE": str(tmp_path / "xform")}
    rest = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")}
    done = subprocess.run([sys.executable, "-c", program], env=rest | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_ranges_of_dims_are_verified_beside_given_inputs() -> None:
    rng = np.random.default_rng(3)
    given = {name: rng.standard_normal((3, 8)).astype(np.float32) for name in ("x", "skip")}
    verified = xform.optimize(proto(), inputs=given, dynamic={"batch": (2, 11)}).report.verification
    assert verified.passed and {"batch=2", "batch=11", "batch=3"} <= _sizes(verified.inputs)
    with pytest.raises(UsageError, match="is not a range"):
        xform.optimize(proto(), inputs=given, dynamic={"batch": (11, 2)})


def _sizes(inputs: Any) -> set[str]:
    return {word.strip("(),") for text in inputs for word in str(text).split() if "batch=" in word}


def runtime_norm(*outputs: str) -> onnx.ModelProto:
    """RMSNorm as ONNX Runtime's own tools write it: an operator without a domain that ONNX does not define."""
    rng = np.random.default_rng(31)
    attributes = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
    node = onnx.helper.make_node("SimplifiedLayerNormalization", ["x", "scale"], list(outputs), "norm", **attributes)
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", "t", 8]) for n in ("x", outputs[0])]
    others = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs[1:]]
    scale = onnx.numpy_helper.from_array(rng.normal(size=8).astype(np.float32), "scale")
    graph = onnx.helper.make_graph([node], "g", values[:1], [*values[1:], *others], [scale])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("options", [{}, {"portable": True}, {"opset": 13}])
def test_operators_of_the_runtime_without_a_domain_are_read(options: dict[str, Any]) -> None:
    result = xform.optimize(runtime_norm("y"), **options)
    assert result.report.verification.passed and result.report.concepts == {"rms_norm": 1}
    assert [r.rule for r in result.report.remarks if r.verdict == "applied"] == ["simplified"]


def test_a_norm_whose_statistics_are_read_stays_and_is_not_portable() -> None:
    result = xform.optimize(runtime_norm("y", "deviation"))
    assert result.report.verification.passed
    assert not [r for r in result.report.remarks if r.verdict in ("applied", "rolled_back")]
    with pytest.raises(xform.TargetError, match=r"cannot be portable.*SimplifiedLayerNormalization") as caught:
        xform.optimize(runtime_norm("y", "deviation"), portable=True)
    assert caught.value.where == ("norm",)


def test_a_rule_that_needs_a_dtype_that_nobody_knows_is_missed() -> None:
    model = runtime_norm("norm out", "deviation")  # whose type ONNX cannot infer
    model.graph.output[0].name = "y"
    quick = onnx.helper.make_node("QuickGelu", ["norm out"], ["y"], "quick", domain="com.microsoft", alpha=1.702)
    model.graph.node.append(quick)
    model.opset_import.add(domain="com.microsoft", version=1)
    result = xform.optimize(model)
    assert result.report.verification.passed
    assert not [r for r in result.report.remarks if r.verdict == "rolled_back"]
    missed = [r.reason for r in result.report.remarks if r.rule == "quick_gelu" and r.verdict == "missed"]
    assert missed and "dtype of norm out is not known" in missed[0]


def test_a_result_is_portable_or_refused() -> None:
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 4, 4]) for n in "xy"]
    node = onnx.helper.make_node("Inverse", ["x"], ["y"], "inverse", domain="com.microsoft")
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    assert xform.optimize(model).report.verification.passed
    with pytest.raises(xform.TargetError, match=r"not standard ONNX, com\.microsoft\.Inverse"):
        xform.optimize(model, portable=True)

"""Asking for a precision: who has which, what the file then holds, and what verification makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino as ov
import pytest
import torch
from support import parse

import xform
from xform.backends import BACKENDS, LoadOptions, LowerOptions, get_backend
from xform.backends.openvino import available
from xform.backends.openvino.compile import settings_for
from xform.errors import TargetError, UsageError, XformWarning
from xform.passes.precision import ConvertPrecision
from xform.target import Target

CPU = Target("cpu")
RNG = np.random.default_rng(31)
W = {f"w{i}": (RNG.normal(size=(128, 128)) / 11).astype(np.float32) for i in range(2)}
X = RNG.normal(size=(3, 128)).astype(np.float32)


def graph(body: str = "a = MatMul(x, w0) r = Gelu(a) y = MatMul(r, w1)", **changed: Any) -> ir.Model:
    arrays = {**W, **changed}
    given = ", ".join(f"float[128,128] {name}" for name in arrays)
    return parse(f"g (float[n,128] x, {given}) => (float[n,128] y) {{ {body} }}", arrays)


def close(found: Any, expected: Any, within: float) -> None:
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() <= within * np.abs(expected).max()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_float16_takes_half_the_bytes_and_keeps_the_interface(backend, tmp_path: Path):
    exact = xform.optimize(graph(), backend=backend)
    fast = xform.optimize(graph(), backend=backend, precision="float16")
    assert fast.report.verification.passed and fast.report.verification.tolerance == 5e-2
    assert fast.report.after.bytes * 2 == exact.report.after.bytes
    assert "3 nodes compute in float16" in fast.explain("precision")
    close(fast(X)["y"], exact(X)["y"], 1e-2)
    path = fast.save(tmp_path / "half.onnx")[0]
    proto = onnx.load(path)
    types = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)}
    assert types == {"x": onnx.TensorProto.FLOAT, "y": onnx.TensorProto.FLOAT}
    assert {t.data_type for t in proto.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_what_leaves_the_range_of_float16_stays_in_float32_and_says_so():
    large = (W["w0"] * 1e5).astype(np.float32)  # within the range itself, while products with it are not
    body = "a = MatMul(x, w0) r = Gelu(a) m = ReduceMax(r) d = Div(r, m) y = MatMul(d, w1)"
    fast = xform.optimize(graph(body, w0=large), precision="float16")
    assert "numbers there reach" in fast.explain("precision")
    dtypes = {n.op_type: n.outputs[0].dtype for n in fast.graph.graph if n.op_type in ("MatMul", "Gelu", "Div")}
    assert dtypes == {"MatMul": ir.DataType.FLOAT16, "Gelu": ir.DataType.FLOAT, "Div": ir.DataType.FLOAT}
    assert fast.report.verification.passed


def test_a_rewrite_to_float16_that_is_wrong_is_rolled_back(monkeypatch):
    monkeypatch.setattr(ConvertPrecision, "run", spoiled(ConvertPrecision.run))
    with pytest.warns(XformWarning, match="convert_precision"):
        fast = xform.optimize(graph(), precision="float16")
    assert any("convert_precision was rolled back" in warning for warning in fast.report.warnings)
    assert fast.report.after.bytes == sum(w.nbytes for w in W.values())


def spoiled(run: Any) -> Any:
    """The pass with a tenth of one weight lost."""

    def other(self: ConvertPrecision, model: ir.Model, context: Any) -> bool:
        changed = run(self, model, context)
        for value in model.graph.initializers.values():
            if value.dtype is ir.DataType.FLOAT16 and value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy() * np.float16(0.9), name=value.name)
        return bool(changed)

    return other


def test_float16_beside_int8_leaves_int8_as_it_is():
    fast = xform.optimize(graph(), preset="int8", precision="float16", calibration=[{"x": X}])
    assert fast.report.concepts["int8"] == 2 and fast.report.verification.passed


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_float32_is_what_a_float32_model_has(backend):
    if backend == "torch_triton":
        model = xform.optimize(graph(), backend=backend, precision="float32")
    else:
        model = xform.optimize(graph(), backend=backend, precision="float32")
        assert model.report.after.bytes == sum(w.nbytes for w in W.values())
    assert model.report.verification.passed


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_an_unknown_precision_is_refused_before_any_work(backend):
    with pytest.raises(UsageError, match="float8"):
        xform.optimize(graph(), backend=backend, precision="float8")


def test_onnx_runtime_names_who_has_bfloat16():
    with pytest.raises(UsageError, match="it has precision float32, float16") as error:
        xform.optimize(graph(), precision="bfloat16")
    assert "'openvino'" in str(error.value)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_compile_is_refused_where_torch_does_not_run(backend):
    with pytest.raises(UsageError, match="takes no `compile`"):
        xform.optimize(graph(), backend=backend, compile="inductor")


def cpuinfo(tmp_path: Path, flags: str) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(f"model name\t: something\nflags\t\t: fpu {flags} sse\n")
    return path


def with_capabilities(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(ov.Core, "get_property", lambda self, device, name: list(names))


def test_bfloat16_needs_openvino_and_the_processor_to_have_it(monkeypatch, tmp_path):
    with_capabilities(monkeypatch, "FP32", "BF16")
    assert available.missing_bfloat16(cpuinfo(tmp_path, "amx_bf16")) is None
    assert available.missing_bfloat16(cpuinfo(tmp_path, "avx512_bf16")) is None
    assert available.missing_bfloat16(tmp_path / "absent") is None
    assert "amx_bf16" in str(available.missing_bfloat16(cpuinfo(tmp_path, "avx512f")))
    with_capabilities(monkeypatch, "FP32")
    assert "not BF16" in str(available.missing_bfloat16(cpuinfo(tmp_path, "amx_bf16")))


def test_bfloat16_where_the_processor_lacks_it_says_what_is_missing(monkeypatch):
    with_capabilities(monkeypatch, "FP32", "INT8")
    with pytest.raises(TargetError, match=r"does not compute in bfloat16.*not BF16") as error:
        xform.optimize(graph(), backend="openvino", precision="bfloat16")
    assert type(error.value).exit_code == 7 and "AMX" in str(error.value)


def test_bfloat16_is_a_setting_of_openvino_that_goes_into_its_file(tmp_path):
    backend = get_backend("openvino", CPU)
    assert settings_for(2, 0, "bfloat16")["INFERENCE_PRECISION_HINT"] == "bf16"
    assert settings_for(2)["INFERENCE_PRECISION_HINT"] == "f32"
    artifact = backend.lower(graph(), CPU, LowerOptions(precision="bfloat16", compile_only=True))
    assert artifact.metadata["session"]["INFERENCE_PRECISION_HINT"] == "bf16"
    artifact.save(tmp_path / "model.xml")
    read = ov.Core().read_model(tmp_path / "model.xml")
    assert read.get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]).astype(str) == "bf16"


# Threads


@pytest.mark.parametrize("threads", [0, -1, True, "2", 1.5])
def test_what_is_no_number_of_threads_is_refused(threads):
    with pytest.raises(UsageError, match="threads must be a whole number from 1 on"):
        xform.optimize(graph(), threads=threads)


def test_two_numbers_of_threads_are_refused():
    with pytest.raises(UsageError, match="threads=3 was given, and a target with 2 threads"):
        xform.optimize(graph(), Target("cpu", threads=2), threads=3)
    assert xform.optimize(graph(), Target("cpu", threads=2), threads=2)(X)["y"].shape == (3, 128)


def test_threads_reach_the_runtimes_and_the_file():
    fast = xform.optimize(graph(), backend="onnxruntime", threads=1)
    assert fast.artifact.metadata["session"]["intra_op_threads"] == 1
    session = fast._compiled.runner._session  # type: ignore[attr-defined]
    assert session.get_session_options().intra_op_num_threads == 1
    fast = xform.optimize(graph(), backend="openvino", threads=1)
    assert fast.artifact.metadata["session"]["INFERENCE_NUM_THREADS"] == 1


def test_torch_has_the_threads_while_the_model_runs_and_its_own_number_after():
    before = torch.get_num_threads()
    seen: list[int] = []
    artifact = get_backend("torch_triton", CPU).lower(graph(), Target("cpu", threads=before + 1), LowerOptions())
    runner = get_backend("torch_triton", CPU).load(artifact, LoadOptions())
    module = runner._module  # type: ignore[attr-defined]
    module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    runner.run({"x": X})
    assert seen == [before + 1] and torch.get_num_threads() == before
    assert artifact.metadata["threads"] == before + 1

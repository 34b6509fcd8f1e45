"""The torch backend behind `xform.optimize` and the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from cli_support import save_mlp
from support import floats, parse, run

import xform
from xform.backends.torch_triton.cuda_graphs import Replayer
from xform.backends.torch_triton.lower import to_torch
from xform.backends.torch_triton.state import load_state
from xform.cli import main
from xform.errors import ModelError, TargetError, UsageError

NO_GPU = not torch.cuda.is_available()


class Block(torch.nn.Module):
    """A transformer block with random norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layer(x)
        return {"tokens": y, "pooled": y.mean(1)}


@pytest.fixture(scope="module")
def block() -> Block:
    return Block().eval()


def test_the_module_is_called_like_the_original(block: Block) -> None:
    x = torch.randn(2, 5, 16)
    fast = xform.optimize(block, backend="torch_triton", inputs=x, dynamic="auto")
    assert fast.report.verification.passed and fast.report.backend == "torch_triton"
    for shape in ((2, 5, 16), (3, 9, 16)):
        y = torch.randn(shape)
        with torch.no_grad():
            want = block(y)
        got = fast(y)
        assert set(got) == {"tokens", "pooled"}
        torch.testing.assert_close(got["tokens"], want["tokens"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["pooled"], want["pooled"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_precision(block: Block, precision: str) -> None:
    x = torch.randn(2, 5, 16)
    fast = xform.optimize(block, backend="torch_triton", inputs=x, precision=precision)
    assert any(p.dtype is getattr(torch, precision) for p in fast.artifact.module.parameters())
    got = fast(x)["tokens"]
    assert got.dtype is torch.float32
    assert 0 < float((got - block(x)["tokens"]).abs().max()) < 0.1
    assert fast.report.verification.passed and fast.report.verification.tolerance > 1e-3


def test_onnx_models_take_and_give_arrays_or_tensors() -> None:
    model = parse("g (float[b,4] x, float[4,3] w) => (float[b,3] z) { z = MatMul(x, w) }", {"w": floats(4, 3)})
    fast = xform.optimize(model, backend="torch_triton")
    x = floats(2, 4)
    found = fast(x)["z"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, run(model, {"x": x})[0], rtol=1e-5, atol=1e-6)
    assert isinstance(fast(torch.from_numpy(x))["z"], torch.Tensor)
    with pytest.raises(UsageError, match="axis 1 is fixed"):
        fast(floats(2, 5))
    with pytest.raises(UsageError, match="float64"):
        fast(x.astype(np.float64))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_cuda_without_a_gpu_says_what_is_missing(block: Block) -> None:
    x = torch.randn(2, 5, 16)
    with pytest.raises(TargetError, match=r"(?s)not available for target cuda.*compile_only") as raised:
        xform.optimize(block, target="cuda", inputs=x)
    assert raised.value.exit_code == 7


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_what_was_only_compiled_says_where_it_runs_and_does_not_advise_what_was_done() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(xform.XformWarning, match="`compile_only` was asked for"):
        fast = xform.optimize(torch.nn.Linear(4, 4).eval(), target="cuda", compile_only=True, inputs=x)
    with pytest.raises(TargetError, match=r"(?s)does not run here.*a machine that has one") as raised:
        fast(x)
    assert "compile_only" not in str(raised.value)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_backend_that_does_not_serve_a_target_names_one_that_does(block: Block, backend: str) -> None:
    with pytest.raises(TargetError, match=r"use target='cpu', or backend='torch_triton' for target cuda"):
        xform.optimize(block, target="cuda", backend=backend)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_compile_only_lowers_without_a_gpu(block: Block, tmp_path: Path) -> None:
    lowered = xform.optimize(block, target="cuda", inputs=torch.randn(2, 5, 16), compile_only=True)
    assert any("not run and not compared" in warning for warning in lowered.report.warnings)
    assert lowered.artifact.metadata["lowered"]["residual_norm"] == 2
    assert len(re.findall(r"done +torch_triton/residual_norm", lowered.explain("layer_norm"))) == 2
    with pytest.raises(TargetError, match="compiled on the GPU"):
        lowered.save(tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float8"}, "unknown precision"),
        ({"compile": "fast"}, "unknown compile mode"),
        ({"portable": True}, "no opset and no portable form"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    model = parse("g (float[2] x) => (float[2] z) { z = Relu(x) }")
    with pytest.raises(UsageError, match=message):
        xform.optimize(model, backend="torch_triton", **options)


def test_another_backend_names_torch_for_a_precision_that_it_lacks() -> None:
    model = parse("g (float[2] x) => (float[2] z) { z = Relu(x) }")
    with pytest.raises(UsageError, match="does not compute in precision 'bfloat16'") as error:
        xform.optimize(model, backend="onnxruntime", precision="bfloat16")
    assert "torch_triton" in str(error.value)


def test_the_state_file_holds_weights_and_graph(block: Block, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    fast = xform.optimize(block, backend="torch_triton", inputs=x)
    (path,) = fast.save(tmp_path / "m.safetensors")
    data = path.read_bytes()
    assert b"pickle" not in data and data[8:9] == b"{"
    module = to_torch(load_state(path))
    with torch.no_grad():
        found = [output for output in module(x) if output.shape == (2, 5, 16)]
        torch.testing.assert_close(found[0], fast(x)["tokens"])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load_state(path)


LOADER = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "xform":
            raise ImportError("xform is forbidden here")
sys.meta_path.insert(0, Forbidden())
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
data = torch.load(sys.argv[2], weights_only=True)
for x, want in zip(data["inputs"], data["tokens"]):
    torch.testing.assert_close(model(x)[int(sys.argv[3])], want, rtol=1e-4, atol=1e-5)
assert "xform" not in sys.modules
"""


@pytest.mark.slow
def test_a_package_runs_in_a_process_without_xform(block: Block, tmp_path: Path) -> None:
    inputs = [torch.randn(2, 5, 16), torch.randn(3, 8, 16)]
    fast = xform.optimize(block, backend="torch_triton", inputs=inputs[0], dynamic="auto")
    files = fast.save(tmp_path / "m.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"] and files == [tmp_path / "m.pt2"]
    with torch.no_grad():
        tokens = [block(x)["tokens"] for x in inputs]
    torch.save({"inputs": inputs, "tokens": tokens}, tmp_path / "data.pt")
    place = next(i for i, v in enumerate(fast.graph.graph.outputs) if v.shape is not None and len(v.shape) == 3)
    command = [sys.executable, "-W", "ignore", "-c", LOADER, files[0], tmp_path / "data.pt", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def recorder(module, buffers):  # type: ignore[no-untyped-def]
    """What a recorded CUDA graph does: it reads the buffers and writes the same outputs at every replay."""
    outputs = [output.clone() for output in module(*buffers)]
    views = [i for i, output in enumerate(module(*buffers)) if output.data_ptr() in {b.data_ptr() for b in buffers}]

    def replay() -> None:
        for index, output in enumerate(module(*buffers)):
            if index not in views:
                outputs[index].copy_(output)

    for index in views:
        outputs[index] = buffers[0]
    return replay, outputs


def test_replaying_is_safe_for_inputs_that_share_memory_and_outputs_that_are_views() -> None:
    calls = Replayer(lambda x, y: (x, x + y), recorder)
    memory = torch.arange(6.0)
    first = calls(memory[:4], memory[2:])
    expected = [memory[:4].clone(), memory[:4] + memory[2:]]
    calls(torch.zeros(4), torch.ones(4))  # overwrites the buffers
    assert all(torch.equal(got, want) for got, want in zip(first, expected, strict=True))
    first[0].fill_(7)
    assert torch.equal(memory, torch.arange(6.0))
    assert torch.equal(calls(memory[:4], memory[2:])[0], memory[:4])


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    def refuse(module: object, buffers: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    calls = Replayer(lambda x: (x * 2,), refuse)  # type: ignore[arg-type]
    assert torch.equal(calls(torch.ones(2))[0], torch.full((2,), 2.0))
    assert calls.refused == "operation not permitted when stream is capturing"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = save_mlp(tmp_path / "m.onnx"), tmp_path / "m.safetensors"
    command = ["optimize", str(model), "-o", str(output)]
    assert main([*command, "--backend", "torch_triton", "--precision", "bfloat16"]) == 0
    assert load_state(output).graph.outputs[0].name == "y"
    if NO_GPU:
        assert main([*command, "--target", "cuda"]) == 7
        assert "not available for target cuda" in capsys.readouterr().err
        assert main([*command, "--target", "cuda", "--compile-only"]) == 0


def test_explain_tells_which_kernels_a_gpu_gets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    model = parse(
        "g (float[2,8] x, float[2,8] r, float[8] w) => (float[2,8] z) { s = Add(x, r) z = RMSNormalization(s, w) }",
        {"w": floats(8)},
    )
    path = tmp_path / "m.onnx"
    onnx_ir.save(model, path)
    for target, remarks in (("cpu", []), ("cuda", [("torch_triton", "residual_norm", "applied")])):
        assert main(["explain", str(path), "rms_norm", "--json", "--target", target, "--verify", "off"]) == 0
        found = json.loads(capsys.readouterr().out)["remarks"]
        assert [(r["pass_name"], r["rule"], r["verdict"]) for r in found] == remarks


def test_operators_that_only_torch_has_are_verified_and_run() -> None:
    class Special(torch.nn.Module):
        def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return torch.special.gammainc(x, a).relu() + x * 1

    x, a = torch.rand(3, 4) + 0.5, torch.rand(4) + 0.5
    with pytest.raises(TargetError, match="special_gammainc"):
        xform.optimize(Special(), inputs=(x, a), verify="off")
    fast = xform.optimize(Special(), backend="torch_triton", inputs=(x, a), verify="each")
    assert fast.report.verification.passed
    torch.testing.assert_close(fast(x, a), Special()(x, a))


def test_compiled_modules_are_kept_only_where_they_are_faster() -> None:
    model = parse(
        "g (float[4,8] x, float[8,8] w) => (float[4,8] z) { m = MatMul(x, w) z = Gelu(m) }", {"w": floats(8, 8)}
    )
    fast = xform.optimize(model, backend="torch_triton", compile="inductor")
    x = floats(4, 8)
    np.testing.assert_allclose(fast(x)["z"], run(model, {"x": x})[0], rtol=1e-4, atol=1e-5)
    found = fast.artifact.metadata["compile"]
    assert found["chosen"] == min(found["seconds"], key=found["seconds"].get)


def test_convolutions_in_float32_are_not_rounded_to_tf32() -> None:
    from xform.backends.torch_triton.runner import _IEEE_CONVOLUTIONS

    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    everywhere: Any = torch.backends
    before = conv.fp32_precision, everywhere.fp32_precision
    try:
        everywhere.fp32_precision = "tf32"
        for precision in ("tf32", "ieee"):
            conv.fp32_precision = precision
            with pytest.raises(ValueError, match="here"), _IEEE_CONVOLUTIONS:
                with _IEEE_CONVOLUTIONS:  # another thread
                    assert conv.fp32_precision == "ieee"
                assert conv.fp32_precision == "ieee"
                raise ValueError("here")
            assert conv.fp32_precision == precision
    finally:
        conv.fp32_precision, everywhere.fp32_precision = before


def test_a_kernel_that_does_not_compile_for_new_sizes_is_an_error_of_the_target() -> None:
    from triton.runtime.errors import OutOfResources

    from xform.backends.torch_triton.runner import TorchRunner

    fast = xform.optimize(parse("g (float[n] x) => (float[n] y) { y = Relu(x) }"), backend="torch_triton")
    runner = TorchRunner(fast.artifact)

    def refuse(*tensors: torch.Tensor) -> None:
        raise OutOfResources(300000, 232448, "shared memory")

    runner._call = refuse
    with pytest.raises(TargetError, match="shared memory"):
        runner.run({"x": torch.ones(3)})

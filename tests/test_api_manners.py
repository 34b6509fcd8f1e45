"""What a Python user tries first: printing, loading, .eval(), copying, wrong arguments, many sizes."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import xform
from xform.optimized import OptimizedModule

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 5)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def module() -> nn.Sequential:
    return net()


@pytest.fixture(scope="module")
def fast(module: nn.Sequential) -> OptimizedModule:
    result = xform.optimize(module, inputs=X)
    assert isinstance(result, OptimizedModule)
    return result


def test_it_can_be_printed(fast: OptimizedModule, module: nn.Sequential) -> None:
    assert repr(fast).startswith("<xform.OptimizedModule Sequential: onnxruntime on cpu, captured ")
    assert "verified" in repr(fast) and "\n" not in repr(fast)
    assert "not captured yet" in repr(xform.optimize(module))
    lines = str(fast.report).splitlines()
    assert 3 <= len(lines) <= 10 and "Sequential for cpu with onnxruntime" in lines[0]
    assert any("verified" in line for line in lines) and len(repr(fast.report)) < 200
    assert fast._repr_html_().startswith("<table>") and fast.report._repr_html_() == fast._repr_html_()


def test_a_report_shows_whole_warnings_and_says_what_was_verified_on(fast: OptimizedModule) -> None:
    report = copy.copy(fast.report)
    report.warnings = ["a warning of xform. " * 15]
    assert report.warnings[0] in str(report) and report.warnings[0] in report._repr_html_()
    verified = next(line for line in str(fast.report).splitlines() if "verified" in line)
    assert "derived from them" not in verified and "input" in verified


def test_save_names_all_files_in_the_same_way(
    fast: OptimizedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fast.save("m.onnx", report=True) == [tmp_path / "m.onnx", tmp_path / "m.report.json"]


def test_names_from_a_model_cannot_reach_a_notebook_as_html(fast: OptimizedModule) -> None:
    report = copy.copy(fast.report)
    report.source = "<script>\x1b[31m"
    assert "<script>" not in report._repr_html_() and "\x1b" not in str(report)


def test_eval_train_and_to(fast: OptimizedModule) -> None:
    assert fast.eval() is fast and fast.train(False) is fast
    with pytest.raises(xform.UsageError, match="cannot be trained"):
        fast.train()
    assert fast.to("cpu") is fast and fast.to(torch.float32) is fast and fast.to(torch.device("cpu")) is fast
    with pytest.raises(xform.UsageError, match="keeps its dtypes; asked for float16"):
        fast.to(torch.float16)
    with pytest.raises(xform.UsageError, match="stays on the device") as caught:
        fast.to("cuda")
    assert 'target="cuda"' in (caught.value.hint or "")


def test_attributes_of_the_module_are_pointed_to(fast: OptimizedModule) -> None:
    with pytest.raises(AttributeError, match=r"\.original\.state_dict"):
        fast.state_dict()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fast.nonsense  # noqa: B018
    assert not hasattr(fast, "parameters")


def test_copies_are_refused_in_a_sentence(fast: OptimizedModule) -> None:
    for attempt in (lambda: copy.deepcopy(fast), lambda: copy.copy(fast)):
        with pytest.raises(xform.UsageError, match="cannot be"):
            attempt()
    with pytest.raises(xform.UsageError, match="cannot be pickled") as caught:
        pickle.dumps(fast)
    assert "xform.load" in (caught.value.hint or "")


def test_the_package_lists_what_it_has() -> None:
    assert {"optimize", "load", "Optimized", "XformWarning"} <= set(dir(xform))


@pytest.mark.parametrize(
    ("backend", "suffix"), [("onnxruntime", ".onnx"), ("openvino", ".xml"), ("torch_triton", ".safetensors")]
)
def test_what_was_saved_can_be_loaded(module: nn.Sequential, backend: str, suffix: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    made = xform.optimize(module, inputs=X, backend=backend)
    path = made.save(tmp_path / f"net{suffix}", report=True)[0]
    again = xform.load(path)
    with torch.no_grad():
        expected = module(X)
    for outputs in (again(X), again(input=X), again({"input": X})):
        torch.testing.assert_close(outputs["output"], expected, rtol=1e-4, atol=1e-4)
    assert isinstance(again(X.numpy())["output"], np.ndarray)
    assert again.report.concepts == made.report.concepts and again.report.verification.passed
    assert again.explain("layer_norm").startswith("layer_norm") and path.name in repr(again)


def test_a_report_that_is_not_there_is_told_before_anything_is_written(module: nn.Sequential, tmp_path: Path) -> None:
    path = xform.optimize(module, inputs=X).save(tmp_path / "net.onnx")[0]
    loaded = xform.load(path)
    with pytest.raises(xform.UsageError, match="no report beside the file"):
        loaded.save(tmp_path / "again.onnx", report=True)
    assert list(tmp_path.iterdir()) == [path]
    assert loaded.save(tmp_path / "again.onnx") == [tmp_path / "again.onnx"]


def test_loading_something_else_says_what_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"x")
    with pytest.raises(xform.UsageError, match=r"\.pt is not a format"):
        xform.load(tmp_path / "m.pt")
    with pytest.raises(xform.UsageError, match="no such file"):
        xform.load(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(xform.ModelError):
        xform.load(tmp_path / "m.onnx")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "verify": ({"verify": True}, "verify must be 'off', 'final' or 'each', not True"),
    "backend": ({"backend": 3}, "backend must be the name of a backend"),
    "preset": ({"preset": None}, "preset must be the name of a preset"),
    "inputs": ({"inputs": 3}, "inputs=3 is not an example input"),
    "target": ({"target": "cuda:0"}, "names one device"),
    "opset": ({"opset": "17"}, "opset must be a number"),
    "strict": ({"strict": "yes"}, "strict must be True or False"),
    "tolerance": ({"tolerance": True}, "tolerance must be a number"),
    "passes": ({"passes": 3}, "passes must be a list"),
    "a pass": ({"passes": [3]}, "3 is not a pass"),
    "progress": ({"progress": "yes"}, "progress must be True or a function"),
    "dynamic": ({"inputs": X, "dynamic": 3}, "dynamic=3 is not known"),
    "dims": ({"inputs": X, "dynamic": {"input": [0]}}, "is not a dict of axes"),
    "input name": ({"inputs": X, "dynamic": {"inputs": {0: "b"}}}, "which does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(module: nn.Sequential, case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(xform.UsageError) as caught:
        xform.optimize(module, **arguments)
    assert message in caught.value.what
    if case == "input name":
        assert caught.value.hint == "did you mean 'input'?"


def test_numpy_arrays_are_not_tensors(module: nn.Sequential, fast: OptimizedModule) -> None:
    for call in (lambda: fast(X.numpy()), lambda: xform.optimize(module, inputs=X.numpy())):
        with pytest.raises(xform.UsageError, match="NumPy ndarray") as caught:
            call()
        assert "torch.as_tensor" in (caught.value.hint or "")


def test_one_pass_needs_no_list_and_a_class_no_brackets(module: nn.Sequential) -> None:
    from xform.passes import PASSES

    for passes in ("raise_gelu", ["raise_gelu"], [PASSES["raise_gelu"]], PASSES["raise_gelu"]()):
        assert xform.optimize(module, inputs=X, passes=passes).report.concepts["gelu"] == 1


def test_progress_and_log(
    module: nn.Sequential, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO, "xform"):
        xform.optimize(module, inputs=X, progress=lambda *step: steps.append(step))
    assert steps and all(0 <= done <= total for _, done, total in steps)
    assert "Sequential: captured and compiled with onnxruntime" in caplog.text
    xform.optimize(module, inputs=X, progress=True)
    assert capfd.readouterr().err == "" or "raise" not in capfd.readouterr().err  # the bar has vanished


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image).flatten(1)


def test_an_image_model_is_captured_at_most_three_times_for_twelve_sizes() -> None:
    module = Convolutions().eval()
    fast = xform.optimize(module)
    assert isinstance(fast, OptimizedModule)
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(1 + i % 2, 3, 16 + 3 * i, 40 - 2 * i, generator=generator) for i in range(12)]
    with pytest.warns(xform.XformWarning, match="captured again, because image has size 19 in axis 2"):
        for image in images:
            with torch.no_grad():
                torch.testing.assert_close(fast(image), module(image), rtol=1e-4, atol=1e-5)
    assert fast.captures <= 3


def test_graphs_beyond_the_limit_are_forgotten_with_a_warning() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return x * scale

    fast = xform.optimize(Scaled(), verify="off")
    assert isinstance(fast, OptimizedModule)
    with pytest.warns(xform.XformWarning, match="not used for longest is forgotten"):
        for scale in range(10):
            assert torch.equal(fast(X, float(scale)), X * scale)
    assert len(fast._programs) == 8


def test_a_fixed_batch_is_told() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 4) * torch.arange(12.0).reshape(3, 4)

    with pytest.warns(xform.XformWarning, match="the batch is fixed at 3"):
        xform.optimize(Fixed(), inputs=X, dynamic=True)


def test_named_dims_without_a_range_take_the_range_that_the_module_has() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table[: x.shape[0]]

    module = Table().eval()
    fast = xform.optimize(module, inputs=X, dynamic={"x": {0: "rows"}})
    for rows in (2, 5, 8):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(fast(x), module(x).detach())


def test_a_module_that_cannot_be_captured_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    capfd.readouterr()
    with pytest.raises(xform.CaptureError) as caught:
        xform.optimize(Branch(), inputs=X, dynamic="auto")
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_that_onnx_runtime_lacks_kernels_for(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).to(dtype).eval()
    x = X.to(dtype)
    fast = xform.optimize(module, inputs=x)
    tolerance = {torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(fast(x), module(x).detach(), rtol=tolerance, atol=tolerance)
    assert fast.report.verification.passed
    if fast.report.backend != "onnxruntime":
        assert any("has no kernel" in warning for warning in fast.report.warnings)

"""xform.optimize on torch modules: calling convention, first call, recapture, verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import xform
from xform.errors import CaptureError, TargetError, UsageError, VerificationError
from xform.optimized import OptimizedModule


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Net(nn.Module):
    """Two inputs, a plain option, a nested result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, mask: torch.Tensor | None = None) -> dict[str, Any]:
        h = self.dropout(nn.functional.gelu(self.norm(self.linear(x)))) * scale
        if mask is not None:
            h = h.masked_fill(mask, 0.0)
        return {"h": h, "pair": Pair(h.sum(-1), h.argmax(-1)), "parts": [h[:, :2], h[:, 2:]], "name": "net"}


def compare(actual: Any, expected: Any) -> None:
    """The same structure, classes, dtypes and numbers."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            compare(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            compare(one, other)
    else:
        assert actual == expected


def expected_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(*args, **kwargs)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture(scope="module")
def optimized(net: nn.Module) -> OptimizedModule:
    """Captured at its first call."""
    result = xform.optimize(net)
    assert isinstance(result, OptimizedModule) and result.captures == 0
    result(torch.randn(3, 4))
    return result


def test_the_first_call_captures_and_the_next_ones_do_not(net: nn.Module, optimized: OptimizedModule) -> None:
    captures = optimized.captures
    for batch in (3, 1, 8):
        x = torch.randn(batch, 4)
        compare(optimized(x), expected_of(net, x))
        compare(optimized(x=x), expected_of(net, x=x))
        compare(optimized(x, 1.0), expected_of(net, x, 1.0))
    assert optimized.captures == captures


def test_another_plain_value_is_captured_again_with_a_remark(net: nn.Module) -> None:
    result = xform.optimize(net)
    x = torch.randn(3, 4)
    compare(result(x), expected_of(net, x))
    compare(result(x, scale=2.5), expected_of(net, x, scale=2.5))
    assert isinstance(result, OptimizedModule) and result.captures == 2
    assert "captured again, because" in result.explain("capture") and "scale" in result.explain("capture")
    compare(result(x), expected_of(net, x))
    compare(result(x, 2.5), expected_of(net, x, 2.5))
    assert result.captures == 2


def test_another_set_of_tensors_is_captured_again(net: nn.Module) -> None:
    result = xform.optimize(net)
    x, mask = torch.randn(3, 4), torch.rand(3, 6) < 0.5
    compare(result(x, mask=mask), expected_of(net, x, mask=mask))
    compare(result(x), expected_of(net, x))
    assert isinstance(result, OptimizedModule) and result.captures == 2


def test_static_dims_are_captured_again_and_dynamic_ones_are_not(net: nn.Module) -> None:
    static = xform.optimize(net, inputs=torch.randn(3, 4))
    named = xform.optimize(net, inputs=(torch.randn(3, 4),), dynamic={"x": {0: ("batch", 1, 64)}})
    for batch in (3, 5):
        x = torch.randn(batch, 4)
        compare(static(x), expected_of(net, x))
        compare(named(x), expected_of(net, x))
    assert isinstance(static, OptimizedModule) and static.captures == 2
    assert isinstance(named, OptimizedModule) and named.captures == 1
    assert [str(v.shape) for v in named.graph.graph.inputs] == ["[batch,4]"]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "both"])
def test_inputs_come_in_every_form(net: nn.Module, form: str) -> None:
    x, mask = torch.randn(3, 4), torch.rand(3, 6) < 0.5
    forms: dict[str, Any] = {
        "tensor": x,
        "tuple": (x, 2.0),
        "dict": {"x": x, "mask": mask},
        "both": ((x,), {"mask": mask}),
    }
    result = xform.optimize(net, inputs=forms[form])
    assert isinstance(result, OptimizedModule) and result.captures == 1
    args, kwargs = {"tensor": ((x,), {}), "tuple": ((x, 2.0), {}), "dict": ((), forms["dict"]), "both": forms["both"]}[
        form
    ]
    compare(result(*args, **kwargs), expected_of(net, *args, **kwargs))
    assert result.captures == 1


def test_the_module_is_verified_against_itself_and_left_in_training_mode() -> None:
    module = Net().train()
    x = torch.randn(3, 4, requires_grad=True)
    result = xform.optimize(module, inputs=x, dynamic="auto")
    assert module.training and module.dropout.training
    output = result(x)["h"]
    assert not output.requires_grad
    torch.testing.assert_close(output, expected_of(module.eval(), x)["h"], rtol=1e-5, atol=1e-5)
    verification = result.report.verification
    assert verification.passed is True and (verification.given, verification.random) == (1, 0)
    assert result.report.source == "Net" and result.report.concepts["layer_norm"] == 1


def test_a_graph_that_differs_from_its_module_is_not_handed_out(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module
) -> None:
    import xform.optimized.module as implementation

    original = implementation.capture_torch

    def wrong(*args: Any, **kwargs: Any) -> Any:
        captured = original(*args, **kwargs)
        for value in captured.model.graph.initializers.values():
            if value.name == "norm.bias":
                import onnx_ir as ir

                assert value.const_value is not None
                value.const_value = ir.tensor(value.const_value.numpy() + 0.1, name="norm.bias")
        return captured

    monkeypatch.setattr(implementation, "capture_torch", wrong)
    with pytest.raises(VerificationError, match="differs from"):
        xform.optimize(net, inputs=torch.randn(3, 4))


def test_questions_before_the_first_call_say_what_to_do(net: nn.Module) -> None:
    result = xform.optimize(net)
    for question in ("report", "graph", "artifact"):
        with pytest.raises(UsageError, match="call it once, or give inputs"):
            getattr(result, question)


def test_saving_writes_the_graph_with_the_names_of_the_module(net: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    result = xform.optimize(net, inputs=x)
    (path,) = result.save(tmp_path / "net.onnx")
    session = ort.InferenceSession(str(path))
    assert [i.name for i in session.get_inputs()] == ["x"]
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected_of(net, x)["h"], rtol=1e-5, atol=1e-5)


def test_inputs_are_not_changed_by_a_module_that_writes_into_them() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1.0) * 2.0

    x = torch.zeros(2, 3)
    output = xform.optimize(InPlace(), inputs=x.clone())(x)
    torch.testing.assert_close(output, torch.full((2, 3), 2.0))
    assert torch.equal(x, torch.zeros(2, 3))


def test_dataclass_results_keep_their_class() -> None:
    @dataclass
    class Result:
        y: torch.Tensor
        note: str

    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> Result:
            return Result(x.relu(), "kept")

    x = torch.randn(2, 3)
    result = xform.optimize(Module())(x)
    assert type(result) is Result and result.note == "kept"
    torch.testing.assert_close(result.y, x.relu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_float_dtypes(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype).eval()
    x = torch.randn(3, 4, dtype=dtype)
    output = xform.optimize(module, inputs=x)(x)
    assert output.dtype is dtype
    tolerance = {torch.float64: 1e-9, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(output, expected_of(module, x), rtol=tolerance, atol=tolerance)


def test_what_the_chosen_runtime_has_no_kernel_for_is_a_target_error() -> None:
    module = nn.Linear(4, 8).to(torch.bfloat16).eval()
    with pytest.raises(TargetError, match="no kernel for Gemm in bfloat16") as error:
        xform.optimize(module, inputs=torch.randn(3, 4, dtype=torch.bfloat16), backend="onnxruntime")
    assert error.value.exit_code == 7 and "torch_triton" in (error.value.hint or "")


def test_an_exported_program_is_taken_with_its_own_inputs(net: nn.Module) -> None:
    x = torch.randn(3, 4)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    result = xform.optimize(program)
    assert isinstance(result, OptimizedModule) and result.captures == 1
    for batch in (3, 5):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(result(x)["h"], expected_of(net, x)["h"], rtol=1e-5, atol=1e-5)
    assert result.captures == 1


def test_a_graph_module_is_taken() -> None:
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.GELU()).eval())
    x = torch.randn(3, 4)
    torch.testing.assert_close(xform.optimize(module)(x), expected_of(module, x), rtol=1e-5, atol=1e-5)


def test_a_module_that_cannot_be_captured_says_where() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(CaptureError, match=r"test_api_module\.py") as error:
        xform.optimize(Branch())(torch.randn(3))
    assert error.value.exit_code == 3

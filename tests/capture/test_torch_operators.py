"""torch operators without ONNX meaning stay in the graph as nodes of domain `torch`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from xform.capture import capture_torch

LIBRARY = torch.library.Library("xform_test", "DEF")
LIBRARY.define("wave(Tensor x, float speed, int[] steps, *, bool up=True, str mode='sin') -> Tensor")
LIBRARY.define("parts(Tensor[] xs, Tensor? bias, ScalarType dtype) -> (Tensor, Tensor)")


def _wave(x: torch.Tensor, speed: float, steps: list[int], *, up: bool = True, mode: str = "sin") -> torch.Tensor:
    return x.clone()


def _parts(xs: list[torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return xs[0].clone(), xs[1].to(dtype)


for _name, _function in {"wave": _wave, "parts": _parts}.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xform_test::{_name}", _function, lib=LIBRARY)


class Module(nn.Module):
    """A call of one operator between operators that ONNX knows."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x * 2)


def kept(model: ir.Model) -> ir.Node:
    nodes = [node for node in model.graph if node.domain == "torch"]
    assert len(nodes) == 1
    assert model.opset_imports["torch"] == 1
    return nodes[0]


def attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def test_arguments_become_inputs_and_attributes() -> None:
    module = Module(lambda x: torch.ops.xform_test.wave(x, 0.5, [1, 2], up=False, mode="cos") + 1)
    model = capture_torch(module, (torch.randn(2, 3),)).model
    node = kept(model)
    assert node.op_type == "xform_test.wave.default"
    assert [value.producer().op_type for value in node.inputs] == ["Mul"]
    assert attributes(node) == {"speed": 0.5, "steps": (1, 2), "up": 0, "mode": "cos", "inputs": ("x",)}
    (output,) = node.outputs
    assert (output.dtype, output.shape) == (ir.DataType.FLOAT, [2, 3])
    assert [use.node.op_type for use in output.uses()] == ["Add"]


def test_lists_of_tensors_optional_tensors_and_several_outputs() -> None:
    module = Module(lambda x: torch.ops.xform_test.parts([x, x + 1], x.sum(0), torch.float64))
    model = capture_torch(module, (torch.randn(2, 3),)).model
    node = kept(model)
    assert attributes(node) == {"inputs": ("xs[0]", "xs[1]", "bias"), "dtype": "torch.float64"}
    assert [value.producer().op_type for value in node.inputs] == ["Mul", "Add", "ReduceSum"]
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT, ir.DataType.DOUBLE]


def test_an_operator_of_torch_itself_is_kept() -> None:
    model = capture_torch(Module(lambda x: torch.special.bessel_j0(x)), (torch.randn(2, 3),)).model
    assert kept(model).op_type == "aten.special_bessel_j0.default"


def test_an_operator_that_only_decomposes_into_refused_ones_is_kept() -> None:
    model = capture_torch(Module(lambda x: torch.linalg.inv(x) + 1), (torch.randn(3, 3),)).model
    assert kept(model).op_type == "aten.linalg_inv.default"


def test_dynamic_sizes_stay_dynamic() -> None:
    module = Module(lambda x: torch.ops.xform_test.wave(x, 0.5, [1]))
    captured = capture_torch(module, (torch.randn(2, 3),), dynamic={"x": {0: "batch"}})
    assert kept(captured.model).outputs[0].shape[0] == ir.SymbolicDim("batch")


def test_an_operator_that_torch_can_decompose_is_not_kept() -> None:
    model = capture_torch(Module(lambda x: torch.special.xlog1py(x, x + 1)), (torch.rand(2, 3),)).model
    assert {node.domain for node in model.graph} == {""}

"""Capture of torch modules: names, calling convention, what is left untouched, and what is refused."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch_support import assert_same, call

from xform.capture import capture_torch
from xform.capture.onnx_file import notes
from xform.capture.torch_calling import Signature
from xform.capture.torch_twin import twin_of
from xform.errors import CaptureError, UsageError


class Net(nn.Module):
    """Convolution, BatchNorm with statistics, dropout: training and evaluation differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.conv(image))).relu()


Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Found:
    """A plain dataclass that torch's pytree does not know."""

    score: torch.Tensor
    label: str


class Structured(nn.Module):
    """Nested arguments and nested results of many classes."""

    def __init__(self, build: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.build = build

    def forward(self, x: Any, *rest: Any, flag: bool = False, **more: Any) -> Any:
        return self.build(self.linear, x, rest, flag, more)


def eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(*args, **kwargs)


def test_evaluation_mode_is_captured_and_training_flags_come_back() -> None:
    net = Net().train()
    net.drop.eval()
    image = torch.randn(2, 3, 6, 6)
    flags = [child.training for child in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    captured = capture_torch(net, (image,))
    assert [child.training for child in net.modules()] == flags
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert_same(call(captured, (image,)), eager(net.eval(), image))


def test_padded_encoder_layers_are_captured_as_written() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    captured = capture_torch(encoder, (x,), {"src_key_padding_mask": padding})
    assert torch.backends.mha.get_fastpath_enabled()
    actual = call(captured, (x,), {"src_key_padding_mask": padding})
    with twin_of(encoder) as twin:
        assert_same(actual, twin(x, src_key_padding_mask=padding))
    assert_same(actual[~padding], eager(encoder, x, src_key_padding_mask=padding)[~padding])


def test_names_of_inputs_outputs_and_parameters_are_the_modules() -> None:
    captured = capture_torch(Net(), (torch.randn(1, 3, 6, 6),))
    assert captured.input_names == ("image",)
    assert captured.output_names == ("output",)
    names = set(captured.model.graph.initializers)
    assert {"conv.weight", "conv.bias", "norm.weight", "norm.running_mean"} <= names
    onnx.checker.check_model(ir.to_proto(captured.model), full_check=True)


def test_weights_are_shared_not_copied() -> None:
    net = Net()
    captured = capture_torch(net, (torch.randn(1, 3, 6, 6),))
    tensor = captured.model.graph.initializers["conv.weight"].const_value
    assert tensor is not None and tensor.raw.data_ptr() == net.conv.weight.data_ptr()


def test_nothing_of_the_exporter_is_left_in_a_saved_model() -> None:
    model = capture_torch(Net(), (torch.randn(1, 3, 6, 6),)).model
    assert b"pkg.torch" not in ir.to_proto(model).SerializeToString()
    assert model.meta["xform.source_opset"] == model.opset_imports[""] == 23
    assert not model.functions
    assert "Constant" not in {node.op_type for node in model.graph}
    assert any(node.name and node.name.startswith("conv/") for node in model.graph)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda f, x, *_: (f(x), x * 2), ("output_0", "output_1")),
        (lambda f, x, *_: {"a": f(x), "b": [x + 1, None, 3]}, ("a", "b_0")),
        (lambda f, x, *_: Pair(f(x), {"deep": (x.sum(),)}), ("first", "second.deep_0")),
        (lambda f, x, *_: OrderedDict(late=f(x), early=x - 1), ("late", "early")),
        (lambda f, x, *_: Found(f(x), "cat"), ("score",)),
        (lambda f, x, *_: (f(x), x), ("output_0", "output_1")),
        (lambda f, x, *_: (f(x), x.shape[0], "text"), ("output_0",)),
        (lambda f, x, *_: torch.complex(f(x), x), ("output",)),
    ],
)
def test_results_come_back_in_their_own_classes(build: Any, names: tuple[str, ...]) -> None:
    module = Structured(build)
    x = torch.randn(3, 4)
    captured = capture_torch(module, (x,))
    assert captured.output_names == names
    assert_same(call(captured, (x,)), eager(module, x))


def test_one_tensor_in_two_places_is_one_output() -> None:
    def twice(linear: nn.Linear, x: torch.Tensor, *_: Any) -> Any:
        y = linear(x)
        return {"a": y, "b": y}

    module = Structured(twice)
    x = torch.randn(3, 4)
    captured = capture_torch(module, (x,))
    assert captured.output_names == ("a",)
    assert_same(call(captured, (x,)), eager(module, x))


def test_nested_arguments_are_named_by_their_path() -> None:
    module = Structured(lambda f, x, rest, flag, more: f(x["left"][0]) + x["right"] + rest[0] + more["extra"])
    tensors = [torch.randn(3, 4) for _ in range(4)]
    args = ({"left": [tensors[0]], "right": tensors[1]}, tensors[2])
    captured = capture_torch(module, args, {"extra": tensors[3]})
    assert captured.input_names == ("x.left_0", "x.right", "rest_0", "extra")
    assert_same(call(captured, args, {"extra": tensors[3]}), eager(module, *args, extra=tensors[3]))


class TwoInputs(nn.Module):
    """Arguments that can be given by position or by name, one with a default."""

    def forward(self, x: torch.Tensor, scale: float = 2.0, shift: torch.Tensor | None = None) -> torch.Tensor:
        y = x * scale
        return y if shift is None else y + shift


def test_equal_calls_spelled_differently_are_one() -> None:
    x, shift = torch.randn(3, 4), torch.randn(3, 4)
    captured = capture_torch(TwoInputs(), (x,), {"shift": shift})
    assert captured.input_names == ("x", "shift")
    for args, kwargs in [((x, 2.0, shift), {}), ((), {"shift": shift, "x": x}), ((x,), {"scale": 2.0, "shift": shift})]:
        assert captured.accepts(args, kwargs)
        assert_same(call(captured, args, kwargs), x * 2.0 + shift)


def test_flat_arguments_need_no_tree() -> None:
    """The short way for calls of tensors and plain values gives what the long way gives."""

    class Catch(nn.Module):
        def forward(self, x: Any, scale: float = 1.0, *more: Any, **other: Any) -> Any:
            return x

    signature = Signature.of(Catch())
    x, y = torch.randn(2), torch.randn(3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}), ((), {"x": x, "scale": 2.0}), ((x, None), {}),
        ((x, 2.0, y), {}), ((x,), {"b": y, "a": 1}), (([x],), {}),
    ]  # fmt: skip
    for args, kwargs in calls:
        got, want = signature.flatten(args, kwargs), signature._flatten_tree(signature.bind(args, kwargs))
        assert (got.order, got.constants, got.spec) == (want.order, want.constants, want.spec)
        assert list(got.tensors) == list(want.tensors)
        assert all(tensor is want.tensors[name] for name, tensor in got.tensors.items())
    with pytest.raises(UsageError, match="argument x is a object"):
        signature.flatten((object(),), {})


def test_leaves_and_call_form_are_the_inverses() -> None:
    x, shift = torch.randn(3, 4), torch.randn(3, 4)
    captured = capture_torch(TwoInputs(), (x,), {"shift": shift})
    args, kwargs = captured.call_form(captured.flatten((x,), {"shift": shift}))
    assert_same(TwoInputs()(*args, **kwargs), x * 2.0 + shift)
    result = eager(TwoInputs(), x, shift=shift)
    assert [leaf is result for leaf in captured.leaves(result)] == [True]


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"scale": 3.0}, "scale"),
        ({"shift": torch.zeros(3, 4)}, "shift"),
        ({"x": torch.zeros(3, 5)}, "size 5 in axis 1"),
        ({"x": torch.zeros(3)}, "1 dims"),
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "float64"),
        ({"x": 1.0}, "x"),
    ],
)
def test_calls_that_differ_are_refused_with_the_reason(kwargs: dict[str, Any], reason: str) -> None:
    captured = capture_torch(TwoInputs(), (torch.randn(3, 4),))
    call_kwargs = {"x": torch.randn(3, 4), **kwargs}
    assert not captured.accepts((), call_kwargs)
    with pytest.raises(UsageError, match=reason):
        captured.flatten((), call_kwargs)


def test_arguments_that_fit_no_signature_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="missing a required argument: 'x'"):
        capture_torch(TwoInputs())
    with pytest.raises(UsageError, match="object"):
        capture_torch(TwoInputs(), (object(),))


def test_graph_modules_and_exported_programs() -> None:
    net = Net().eval()
    image = torch.randn(2, 3, 6, 6)
    expected = eager(net, image)
    traced = torch.fx.symbolic_trace(net)
    assert_same(call(capture_torch(traced, (image,)), (image,)), expected)
    batch = torch.export.Dim("n", max=8)
    program = torch.export.export(net, (image,), dynamic_shapes={"image": {0: batch}})
    captured = capture_torch(program)
    assert captured.dynamic_dims == {"image": {0: "batch"}}
    assert captured.dim_ranges == {"batch": (1, 8)}
    assert_same(call(captured, (image,)), expected)
    other = torch.randn(5, 3, 6, 6)
    assert_same(call(captured, (other,)), eager(net, other))
    assert captured.refuses((torch.randn(9, 3, 6, 6),)) == "batch is 9, captured for 1 to 8"


def test_exported_programs_with_keyword_arguments_keep_their_form() -> None:
    module = Structured(lambda f, x, rest, flag, more: f(x) + more["extra"])
    x, extra = torch.randn(3, 4), torch.randn(3, 4)
    captured = capture_torch(torch.export.export(module, (x,), {"extra": extra}))
    assert_same(call(captured, (x,), {"extra": extra}), eager(module, x, extra=extra))


def test_files_are_refused_because_they_are_pickles() -> None:
    with pytest.raises(CaptureError, match="never loaded"):
        capture_torch("model.pt")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="dict"):
        capture_torch({"weight": torch.zeros(1)})  # type: ignore[arg-type]


class Branch(nn.Module):
    """Python control flow on the value of a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # THE LINE
            return x
        return -x


def test_a_failure_names_the_line_of_the_model_and_what_to_try() -> None:
    with pytest.raises(CaptureError) as caught:
        capture_torch(Branch(), (torch.randn(3),))
    assert len(caught.value.where) == 1
    assert "test_torch_module.py" in caught.value.where[0]
    assert caught.value.where[0].endswith("if x.sum() > 0:  # THE LINE")
    assert caught.value.hint is not None and "torch.where" in caught.value.hint


class Wrong(nn.Module):
    """An ordinary mistake in the user's own code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.zeros(7, 7)  # MISMATCH


def test_a_mistake_in_the_model_is_named_too() -> None:
    with pytest.raises(CaptureError) as caught:
        capture_torch(Wrong(), (torch.randn(3, 4),))
    assert caught.value.where[0].endswith("# MISMATCH")
    assert caught.value.exit_code == 3


class Counter(nn.Module):
    """A module that writes into its own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * self.calls


def test_state_that_forward_changes_is_noted_and_left_alone() -> None:
    module = Counter()
    captured = capture_torch(module, (torch.ones(3),))
    assert ["buffer calls" in note for note in notes(captured.model)] == [True]
    assert float(module.calls) == 0.0
    assert_same(call(captured, (torch.ones(3),)), torch.ones(3))
    assert float(module.calls) == 0.0

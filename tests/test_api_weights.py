"""The user's module is theirs: buffers, random state, training mode, and weights that change after the capture."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import xform
from xform.optimized import OptimizedModule
from xform.optimized.weights import ModuleWeights


class Counter(nn.Module):
    """A counter, a cache written by slices, a list and an object of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(4, 2))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        self.cache[0] = x
        self.seen.append(x)
        return x * self.n + self.cache.sum(0)


@pytest.mark.filterwarnings("ignore::xform.XformWarning")
def test_buffers_attributes_and_random_state_are_left_alone() -> None:
    module = Counter().eval()
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    fast = xform.optimize(module)
    fast(torch.ones(2))
    fast(torch.ones(2) * 3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module.n == 0 and not module.cache.any() and module.seen == []
    assert any("writes into its buffer n" in warning for warning in fast.report.warnings)


def test_a_module_that_raises_while_it_is_captured_is_left_as_it_was() -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.n += 1
            if self.linear(x).sum() > 0:
                return x
            return -x

    module = Raises()
    before = {name: (id(t), t.clone()) for name, t in module.state_dict(keep_vars=True).items()}
    with pytest.raises(xform.CaptureError):
        xform.optimize(module, inputs=torch.ones(1, 2))
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])
    assert module.training and module.linear.training


def net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64))
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.eval()


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _step(module: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(IMAGE).sum().backward()
    optimizer.step()


def _load(module: nn.Sequential) -> None:
    module.load_state_dict({name: tensor * 2 for name, tensor in module.state_dict().items()})


def _assign(module: nn.Sequential) -> None:
    module.load_state_dict({name: tensor * 2 for name, tensor in module.state_dict().items()}, assign=True)


def _replace(module: nn.Sequential) -> None:
    module[4].weight = nn.Parameter(module[4].weight.detach() * 2)


def _replace_module(module: nn.Sequential) -> None:
    module[4] = nn.Linear(16 * 36, 64)


def _one(module: nn.Sequential) -> None:
    with torch.no_grad():
        module[4].bias[3] += 1.0


CHANGES: dict[str, Callable[[nn.Sequential], None]] = {
    "optimizer step": _step,
    "load_state_dict": _load,
    "load_state_dict with assign": _assign,
    "another parameter": _replace,
    "another submodule": _replace_module,
    "one element": _one,
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_are_told_and_never_mixed(change: str, tmp_path: Path) -> None:
    module = net()
    fast = xform.optimize(module, inputs=IMAGE)
    before = fast(IMAGE)
    CHANGES[change](module)
    with torch.no_grad():
        expected = module(IMAGE)
    assert not torch.allclose(before, expected)
    with pytest.warns(xform.XformWarning, match="captured again, because the module.* changed"):
        actual = fast(IMAGE)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(fast, OptimizedModule) and fast.captures == 2
    assert any("captured again" in warning for warning in fast.report.warnings)
    (path,) = fast.save(tmp_path / "net.onnx")
    saved = ort.InferenceSession(str(path)).run(None, {"input": IMAGE.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(saved), expected, rtol=1e-4, atol=1e-4)


def test_writes_through_data_are_seen_within_as_many_calls_as_there_are_weights() -> None:
    module = net()
    fast = xform.optimize(module, inputs=IMAGE)
    module[4].weight.data.mul_(3.0)  # torch does not count writes of this kind
    with pytest.warns(xform.XformWarning, match=r"weights have changed \(4.weight"):
        outputs = [fast(IMAGE) for _ in range(len(module.state_dict()) + 1)]
    with torch.no_grad():
        torch.testing.assert_close(outputs[-1], module(IMAGE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("through_data", [False, True])
def test_save_refuses_a_mix_of_old_and_new_weights(through_data: bool, tmp_path: Path) -> None:
    module = net()
    fast = xform.optimize(module, inputs=IMAGE)
    with torch.no_grad():
        for parameter in module.parameters():
            (parameter.data if through_data else parameter).mul_(1.5)
    with pytest.raises(xform.VerificationError, match="changed after the optimized model was verified") as caught:
        fast.save(tmp_path / "net.onnx")
    assert "optimize" in (caught.value.hint or "") and not list(tmp_path.iterdir())


def test_save_refuses_when_a_tensor_that_is_no_parameter_has_changed(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.randn(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.table

    module = Scaled().eval()
    fast = xform.optimize(module, inputs=torch.randn(2, 64))
    module.table.data.mul_(1.5)
    with pytest.raises(xform.VerificationError, match="changed after the optimized model was verified"):
        fast.save(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_save_refuses_when_a_weight_that_is_transposed_lazily_has_changed(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    ).eval()
    fast = xform.optimize(module)
    fast(torch.randn(2, 3, 9, 9))
    with torch.no_grad():
        module[4].weight.mul_(2)
    with pytest.raises(xform.VerificationError, match="changed after"):
        fast.save(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_when_external_weights_changed_on_disk(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(torch.randn(64, 64).numpy(), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [2, 64])],
        [onnx.helper.make_tensor_value_info("y", 1, [2, 64])],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    fast = xform.optimize(path)
    fast.save(tmp_path / "first.onnx")
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(bytes(len(data)))
    with pytest.raises(xform.VerificationError, match="changed after the model was read"):
        fast.save(tmp_path / "second.onnx")


def test_training_mode_is_told_where_it_makes_a_difference() -> None:
    x = torch.randn(3, 4)
    dropping = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    with pytest.warns(xform.XformWarning, match="Sequential is in training mode"):
        fast = xform.optimize(dropping, inputs=x)
    assert dropping.training and any("training mode" in warning for warning in fast.report.warnings)
    indifferent = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert indifferent.training
    assert xform.optimize(indifferent, inputs=x).report.warnings == []


def test_looking_for_changes_is_cheap() -> None:
    module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(50)])
    weights = ModuleWeights(module)
    assert not weights.changed()
    best = min(_seconds(weights) for _ in range(20))
    assert best < 100e-6  # for 100 tensors and 51 modules; about 10 on an idle machine


def _seconds(weights: ModuleWeights) -> float:
    start = time.perf_counter()
    for _ in range(20):
        weights.changed()
    return (time.perf_counter() - start) / 20

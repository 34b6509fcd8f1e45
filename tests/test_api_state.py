"""What a module is beside its weights (attributes, hooks, counters), and arguments that only look alike."""

from __future__ import annotations

import enum
import types
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import xform
from xform.optimized import OptimizedModule

X = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 4)).astype(np.float32))


class Configured(nn.Module):
    """Reads attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.act: nn.Module = nn.ReLU()
        self.scale = 2.0
        self.table = torch.rand(4, generator=generator)
        self.tables = [torch.rand(4, generator=generator)]
        self.options = {"outer": {"shift": 1.0}}
        self.config = SimpleNamespace(gate=False, sizes=[1, 2])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.act(self.linear(x))) * self.scale + self.table + self.tables[0]
        y = y + self.options["outer"]["shift"] * self.config.sizes[0]
        return y.sigmoid() if self.config.gate else y


def _tripled(*arguments: Any) -> Any:
    return arguments[-1] * 3


def _forward_of_its_own(module: Any) -> None:
    module.forward = types.MethodType(lambda self, x: self.linear(x), module)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "an attribute": (lambda m: setattr(m, "scale", 5.0), "scale"),
    "an attribute of a submodule": (lambda m: setattr(m.norm, "eps", 1.0), "norm.eps"),
    "a plain tensor, in place": (lambda m: m.table.add_(1.0), "table"),
    "another plain tensor": (lambda m: setattr(m, "table", torch.ones(4)), "table"),
    "a tensor in a list": (lambda m: m.tables[0].mul_(2.0), "tables.0"),
    "a nested dict": (lambda m: m.options["outer"].update(shift=4.0), "options.outer.shift"),
    "a configuration": (lambda m: setattr(m.config, "gate", True), "config.gate"),
    "a list of a configuration": (lambda m: m.config.sizes.__setitem__(0, 7), "config.sizes.0"),
    "a submodule without weights": (lambda m: setattr(m, "act", nn.Tanh()), "act"),
    "a submodule, behind torch's back": (lambda m: m._modules.update(act=nn.Tanh()), "act"),
    "a hook": (lambda m: m.linear.register_forward_hook(_tripled), "the hooks of linear"),
    "a hook before": (lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] + 1,)), "the hooks of the module"),
    "forward": (_forward_of_its_own, "forward"),
    "a write through .data": (lambda m: m.linear.weight.data.mul_(2.0), "linear.weight"),
    "other .data": (lambda m: setattr(m.linear.weight, "data", torch.ones(4, 4)), "linear.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_forward_reads_is_watched(change: str) -> None:
    module = Configured().eval()
    fast = xform.optimize(module, inputs=X, verify="off")
    before = fast(X)
    apply, name = CHANGES[change]
    with torch.no_grad():
        apply(module)
        expected = module(X)
    assert not torch.allclose(before, expected)
    with pytest.warns(xform.XformWarning, match=rf"captured again, because .* changed \({name}\)"):
        torch.testing.assert_close(fast(X), expected, rtol=1e-4, atol=1e-4)


def test_a_hook_that_is_removed_is_gone() -> None:
    module = Configured().eval()
    hook = module.linear.register_forward_hook(_tripled)
    fast = xform.optimize(module, inputs=X)
    hook.remove()
    with pytest.warns(xform.XformWarning, match="the hooks of linear"), torch.no_grad():
        torch.testing.assert_close(fast(X), module(X), rtol=1e-4, atol=1e-4)


class Remembers(nn.Module):
    """Keeps its last result, a list of them, and a recurrent layer's own lists of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4)
        self.last: Any = None
        self.all: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last, _ = self.rnn(x)
        self.all.append(self.last)
        return self.last * 2


def test_what_forward_itself_writes_is_no_change() -> None:
    module = Remembers().eval()
    fast = xform.optimize(module, inputs=X)
    assert isinstance(fast, OptimizedModule)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", xform.XformWarning)
        for _ in range(3):
            torch.testing.assert_close(fast(X), module(X), rtol=1e-4, atol=1e-4)
        module.train().eval()
        fast(X)
    assert fast.captures == 1 and len(module.all) == 3


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_a_counter_that_is_no_buffer_is_told() -> None:
    module = Counts()
    with pytest.warns(xform.XformWarning, match="forward changes its attribute calls"):
        fast = xform.optimize(module, inputs=X)
    torch.testing.assert_close(fast(X), X)
    assert module.calls == 0


class Decays(nn.Module):
    """Writes into its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
        return self.linear(x)


def test_a_parameter_that_forward_writes_is_left_alone_and_told() -> None:
    module = Decays()
    weight, version = module.linear.weight.detach().clone(), module.linear.weight._version
    with pytest.warns(xform.XformWarning, match="writes into its parameter linear.weight"):
        fast = xform.optimize(module, inputs=X)
    expected = nn.functional.linear(X, weight / 2, module.linear.bias)
    for _ in range(2):
        torch.testing.assert_close(fast(X), expected)
    assert torch.equal(module.linear.weight, weight) and module.linear.weight._version == version
    assert fast.report.verification.passed


class Divides(nn.Module):
    def forward(self, x: torch.Tensor, z: float = 0.0, gain: float = 1.0) -> torch.Tensor:
        return x / torch.full((4,), z) * gain


def test_zeros_of_either_sign_and_nan_are_values_of_their_own() -> None:
    module = Divides()
    fast: Any = xform.optimize(module)
    for args in ((), (-0.0,), (0.0,), (-0.0,), (1.0, float("nan")), (1.0, -float("nan"))):
        torch.testing.assert_close(fast(X, *args), module(X, *args), equal_nan=True)
    assert fast.captures == 3


class Long(nn.Module):
    """Computes something else where the first dim is 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] > 1 else x - 1


def test_a_first_call_of_one_where_one_is_special() -> None:
    module = Long()
    fast: Any = xform.optimize(module)
    for size in (1, 3, 1, 2):
        x = X[:1].expand(size, 4) + 1
        torch.testing.assert_close(fast(x), module(x))


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def test_random_numbers_are_told() -> None:
    with pytest.warns(xform.XformWarning, match="forward of Draws draws random numbers"):
        xform.optimize(Draws(), inputs=X)
    assert xform.optimize(nn.Sequential(nn.Dropout(), nn.ReLU()).eval(), inputs=X).report.warnings == []


class Mode(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


class Returns(nn.Module):
    def forward(self, x: torch.Tensor, mode: Any = None) -> Any:
        if mode == "nothing":
            return None
        if mode == "unnamed":
            return {"": x + 1, "x": x * 2}
        return x.new_zeros(mode) + 1 if isinstance(mode, torch.Size) else x * (2 if mode is Mode.DOUBLE else 1), mode


def test_arguments_and_results_of_odd_kinds() -> None:
    module = Returns()
    fast: Any = xform.optimize(module)
    torch.testing.assert_close(fast(X, "unnamed"), module(X, "unnamed"))
    for mode in (Mode.DOUBLE, Mode.PLAIN, Mode.DOUBLE):
        result, returned = fast(X, mode)
        torch.testing.assert_close(result, module(X, mode)[0])
        assert returned is mode
    with pytest.raises(xform.CaptureError, match="returns nothing that is computed from its inputs"):
        fast(X, "nothing")


def test_a_size_is_an_argument() -> None:
    module = Sized()
    fast: Any = xform.optimize(module)
    for size in (torch.Size([2, 4]), torch.Size([1, 4])):
        torch.testing.assert_close(fast(X, size), module(X, size))
        assert fast.report.verification.passed


class Sized(nn.Module):
    def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        return x * 2 + torch.ones(size)


def test_arguments_that_the_module_itself_refuses() -> None:
    fast: Any = xform.optimize(nn.Linear(4, 4))
    with pytest.raises(xform.UsageError, match="Linear itself fails with these arguments: RuntimeError: mat1 and mat2"):
        fast(X.double())
    fast(X)


def test_autocast_is_part_of_a_call() -> None:
    module = nn.Linear(4, 4)
    fast: Any = xform.optimize(module)
    for enabled in (True, False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            expected, actual = module(X), fast(X)
        assert actual.dtype is expected.dtype
        torch.testing.assert_close(actual, expected, rtol=2e-2 if enabled else 1e-5, atol=2e-2 if enabled else 1e-5)
    assert fast.captures == 2


def test_a_lazy_module_is_to_be_called_first() -> None:
    module = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(xform.UsageError, match=r"0.weight .* is not initialized"):
        xform.optimize(module)(X)
    module(X)
    with torch.no_grad():
        torch.testing.assert_close(xform.optimize(module)(X), module(X))

"""One tensor given for several arguments, or for an argument and a parameter: inputs of their own all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xform
from xform.optimized.calls import told_apart


class Attend(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.mT, -1) @ v


class Listed(nn.Module):
    def forward(self, parts: list[torch.Tensor], more: dict[str, torch.Tensor]) -> torch.Tensor:
        return parts[0] - 2 * parts[1] + 3 * more["x"]


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three views of one storage, two of which overlap."""
    rows = torch.cat([x, x + 1])
    return rows[:4], rows[2:6], rows[4:]


Call = Callable[[torch.Tensor], tuple[Any, ...]]
CASES: dict[str, tuple[nn.Module, Call, Call]] = {
    "one tensor": (Attend(), lambda x: (x, x, x), lambda x: (x, x + 1, x * 2)),
    "views": (Attend(), views, lambda x: (x, x + 1, x * 2)),
    "nested": (Listed(), lambda x: ([x, x], {"x": x}), lambda x: ([x, x + 1], {"x": x * 2})),
}


@pytest.mark.parametrize("first_call", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_aliased_arguments_are_inputs_of_their_own(case: str, first_call: bool) -> None:
    module, alias, apart = CASES[case]
    module.eval()
    x = drawn(0, 4, 4)
    if first_call:
        fast = xform.optimize(module)
        with pytest.warns(xform.XformWarning, match="each argument is an input of its own"):
            fast(*alias(x))
    else:
        with pytest.warns(xform.XformWarning, match="each argument is an input of its own"):
            fast = xform.optimize(module, inputs=alias(x))
    assert fast.report.verification.passed and any("own" in warning for warning in fast.report.warnings)
    for args in (alias(x), apart(x)):
        torch.testing.assert_close(fast(*args), module(*args), rtol=1e-5, atol=1e-5)


def test_an_argument_that_is_a_parameter_is_an_input() -> None:
    module = Weighted().eval()
    with pytest.warns(xform.XformWarning, match="x shared memory"):
        fast = xform.optimize(module, inputs=module.weight)
    x = drawn(1, 4, 4)
    torch.testing.assert_close(fast(x), module(x).detach(), rtol=1e-5, atol=1e-5)


def test_verification_sees_distinct_values_of_the_same_kind() -> None:
    given = {"ids": torch.arange(10), "mask": torch.arange(10) % 3 == 0, "x": drawn(2, 10), "same": torch.ones(10)}
    others = told_apart(given)
    for name, tensor in given.items():
        assert others[name].dtype is tensor.dtype and not torch.equal(others[name], tensor)
    assert sorted(others["ids"].tolist()) == list(range(10)) and others["mask"].sum() == given["mask"].sum()
    assert ((others["same"] >= 0.5) & (others["same"] <= 1.5)).all()


def test_a_graph_that_mixes_aliased_inputs_up_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import xform.optimized.module as implementation

    original = implementation.capture_torch

    def wrong(*args: Any, **kwargs: Any) -> Any:
        captured = original(*args, **kwargs)
        q, k, _ = captured.model.graph.inputs
        k.replace_all_uses_with(q)
        return captured

    monkeypatch.setattr(implementation, "capture_torch", wrong)
    x = drawn(0, 4, 4)
    with pytest.raises(xform.VerificationError):
        xform.optimize(Attend().eval(), inputs=(x, x, x))

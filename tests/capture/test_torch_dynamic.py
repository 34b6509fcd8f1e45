"""Dynamic dims: found, named, ranged, derived, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch_support import assert_same, call

from xform.capture import capture_torch
from xform.capture.onnx_file import notes
from xform.errors import CaptureError, UsageError


class Sum(nn.Module):
    """Token embeddings with a mask, summed over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
        return (self.table(ids) * mask[..., None]).sum(1), ids.shape[1]


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, 10, (batch, length)), "mask": torch.rand(batch, length)}


def check(module: nn.Module, captured: Any, kwargs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        assert_same(call(captured, (), kwargs), module(**kwargs))


def test_nothing_is_dynamic_unless_asked() -> None:
    captured = capture_torch(Sum(), (), tokens(2, 5))
    assert captured.dynamic_dims == {}
    assert captured.refuses((), tokens(3, 5)) == "ids has size 3 in axis 0, captured with 2"


def test_auto_finds_batch_and_sequence_from_an_example_of_size_one() -> None:
    module = Sum()
    captured = capture_torch(module, (), tokens(1, 1), dynamic="auto")
    assert captured.dynamic_dims == {name: {0: "batch", 1: "sequence"} for name in ("ids", "mask")}
    assert not notes(captured.model)
    for sizes in [(1, 1), (2, 5), (1, 7), (4, 1)]:
        check(module, captured, tokens(*sizes))
    shapes = [list(value.shape) for value in captured.model.graph.inputs]
    assert [[str(dim) for dim in shape] for shape in shapes] == [["batch", "sequence"]] * 2
    mixed = {"ids": tokens(2, 5)["ids"], "mask": tokens(2, 6)["mask"]}
    assert captured.refuses((), mixed) == "mask has size 6 in axis 1, captured with sequence"


def test_shapes_are_checked_as_before_when_some_are_known() -> None:
    """Combinations of shapes that fitted are remembered; each of them alone says nothing about another one."""
    captured = capture_torch(Sum(), (), tokens(1, 1), dynamic="auto")
    for _ in range(2):
        for sizes in [(2, 5), (2, 6)]:
            assert captured.accepts((), tokens(*sizes))
        mixed = {"ids": tokens(2, 5)["ids"], "mask": tokens(2, 6)["mask"]}
        assert captured.refuses((), mixed) == "mask has size 6 in axis 1, captured with sequence"
        flat = {"ids": tokens(2, 5)["ids"], "mask": torch.rand(10)}
        assert captured.refuses((), flat) == "mask has 1 dims, captured with 2"


def test_auto_leaves_fixed_sizes_fixed() -> None:
    captured = capture_torch(nn.Linear(4, 3), (torch.randn(1, 6, 4),), dynamic="auto")
    assert captured.dynamic_dims == {"input": {0: "batch", 1: "sequence"}}
    assert [list(value.shape)[2] for value in captured.model.graph.inputs] == [4]
    image = capture_torch(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),), dynamic="auto")
    assert image.dynamic_dims == {"input": {0: "batch"}}


def test_named_dims_with_ranges() -> None:
    module = Sum()
    dynamic = {name: {0: "rows", -1: ("length", 1, 64)} for name in ("ids", "mask")}
    captured = capture_torch(module, (), tokens(2, 5), dynamic=dynamic)
    assert captured.dynamic_dims == {name: {0: "rows", 1: "length"} for name in ("ids", "mask")}
    assert captured.dim_ranges == {"rows": (1, None), "length": (1, 64)}
    check(module, captured, tokens(7, 64))
    assert captured.refuses((), tokens(7, 65)) == "length is 65, captured for 1 to 64"


@pytest.mark.parametrize(
    ("dynamic", "reason"),
    [
        ("always", "not known"),
        ({"words": {0: "batch"}}, "does not exist"),
        ({"ids": {2: "batch"}}, "2 dims"),
        ({"ids": {0: ("batch", 5)}}, "not a dim"),
        ({"ids": {0: ("batch", 5, 3)}}, "not a dim"),
    ],
)
def test_malformed_requests_are_usage_errors(dynamic: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        capture_torch(Sum(), (), tokens(2, 5), dynamic=dynamic)


def test_a_size_that_the_module_fixes_cannot_be_asked_to_vary() -> None:
    with pytest.raises(CaptureError) as caught:
        capture_torch(nn.Linear(4, 3), (torch.randn(2, 4),), dynamic={"input": {1: "features"}})
    assert "axis 1 of input is always 4" in caught.value.what
    assert caught.value.hint is not None and "dynamic" in caught.value.hint


class Halves(nn.Module):
    """A result whose size is computed from the input's, and one input twice as long as the other."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x + y[: x.shape[0]], x + y[x.shape[0] :]])


def test_sizes_that_depend_on_each_other() -> None:
    length = torch.export.Dim("length", min=2)
    x, y = torch.randn(3, 2), torch.randn(6, 2)
    program = torch.export.export(Halves(), (x, y), dynamic_shapes=({0: length}, {0: 2 * length}))
    captured = capture_torch(program)
    assert captured.dynamic_dims == {"x": {0: "batch"}, "y": {0: "2*batch"}}
    x, y = torch.randn(5, 2), torch.randn(10, 2)
    assert_same(call(captured, (x, y)), Halves()(x, y))
    assert captured.refuses((x, torch.randn(9, 2))) == "y has size 9 in axis 0, captured with 2*batch"


class Twice(nn.Module):
    """One value under two names, of which torch sees that they are one only late."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        return y, y.detach()


def test_results_that_turn_out_to_be_one_value() -> None:
    x = torch.randn(2, 3)
    assert_same(call(capture_torch(Twice(), (x,)), (x,)), Twice()(x))

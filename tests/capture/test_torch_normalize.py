"""FX rewrites before ONNX export, one test per rule, with the cases that are left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_support import assert_same, call

from xform.capture import capture_torch

Shape = tuple[int, ...]


class Attend(nn.Module):
    """scaled_dot_product_attention with fixed options."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def operators(module: nn.Module, *args: torch.Tensor, **options: object) -> Counter[str]:
    """Operator counts of the captured graph, after its numbers were found equal."""
    captured = capture_torch(module, args, **options)
    assert_same(call(captured, args), module(*args))
    return Counter(node.op_type for node in captured.model.graph)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask"),
    [
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 7), None),
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 8), (5, 6)),
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 8), (4, 5, 6)),
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 8), (1, 1, 4, 5, 6)),
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 8), (2, 1, 1, 1, 6)),
        ((2, 3, 4, 5, 8), (1, 3, 4, 6, 8), (2, 1, 4, 6, 8), None),
        ((2, 2, 2, 2, 5, 8), (2, 2, 2, 2, 6, 8), (2, 2, 2, 2, 6, 8), None),
        ((2, 5, 8), (2, 6, 8), (2, 6, 8), (2, 5, 6)),
        ((2, 5, 8), (2, 6, 8), (2, 6, 8), (5, 6)),
        ((5, 8), (6, 8), (6, 8), (5, 6)),
    ],
)
def test_attention_of_any_rank_becomes_one_attention(q: Shape, k: Shape, v: Shape, mask: Shape | None) -> None:
    tensors = [torch.randn(shape) for shape in (q, k, v)] + ([torch.randn(mask) > -1] if mask else [])
    assert operators(Attend(), *tensors)["Attention"] == 1


def test_a_dynamic_batch_survives_the_regrouping() -> None:
    tensors = [torch.randn(2, 3, 4, 5, 8) for _ in range(3)]
    captured = capture_torch(Attend(), tensors, dynamic={name: {0: "batch"} for name in "qkv"})
    assert captured.dynamic_dims == {name: {0: "batch"} for name in "qkv"}
    others = [torch.randn(4, 3, 4, 5, 8) for _ in range(3)]
    assert_same(call(captured, others), Attend()(*others))


@pytest.mark.parametrize(
    ("k", "v", "options", "expands"),
    [
        ((2, 1, 6, 8), (2, 1, 6, 8), {}, 0),  # multi-query: a group of its own
        ((2, 2, 6, 8), (2, 2, 6, 8), {"enable_gqa": True}, 0),
        ((2, 4, 6, 8), (2, 4, 6, 8), {"enable_gqa": True}, 0),  # as many heads as the query: the flag says nothing
        ((2, 4, 6, 8), (2, 1, 6, 8), {}, 1),
        ((1, 4, 6, 8), (2, 4, 6, 8), {}, 1),
        ((1, 1, 6, 8), (1, 1, 6, 8), {"is_causal": True}, 2),
    ],
)
def test_heads_and_batches_that_broadcast(k: Shape, v: Shape, options: dict[str, bool], expands: int) -> None:
    found = operators(Attend(**options), torch.randn(2, 4, 5, 8), torch.randn(k), torch.randn(v))
    assert (found["Attention"], found["Expand"]) == (1, expands)


def test_ordinary_attention_is_left_alone() -> None:
    tensors = [torch.randn(2, 4, 5, 8) for _ in range(3)]
    assert operators(Attend(scale=0.2), *tensors) == {"Attention": 1}


class Merge(nn.Module):
    """Heads merged by a view that only the strides of the fused kernel's result allow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(1, 4, 5, 5))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return attended.transpose(1, 2).view(2, 5, 32)


def test_a_view_whose_strides_came_from_a_fused_kernel() -> None:
    tensors = [torch.randn(2, 5, 4, 8).transpose(1, 2) for _ in range(3)]
    assert operators(Merge(), *tensors)["Attention"] == 1


@pytest.mark.parametrize("mask", [(1, 6), (5, 1), (2, 1, 1, 6)])
def test_a_mask_that_broadcasts_is_expanded(mask: Shape) -> None:
    tensors = [torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.randn(mask)]
    found = operators(Attend(), *tensors)
    assert (found["Attention"], found["Expand"]) == (1, 1)


def test_numbers_in_a_float64_module_keep_their_digits() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(x * 0.7 + 0.1) / 0.3

    model = capture_torch(Scaled().double(), (torch.randn(3, 4, dtype=torch.float64),)).model
    numbers = {float(v.const_value.numpy()) for v in model.graph.initializers.values() if v.const_value is not None}
    assert {0.7, 0.1, 0.3} <= numbers

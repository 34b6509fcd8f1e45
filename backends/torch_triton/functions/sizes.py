"""Between Python ints and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def ints_tensor(items: Sequence[int] | int, like: torch.Tensor | None = None) -> torch.Tensor:
    """An int64 scalar (of an int) or vector (of a list), on the device of `like`."""
    device = None if like is None else like.device
    if not isinstance(items, Sequence):
        return torch.scalar_tensor(items, dtype=torch.int64, device=device)
    if all(isinstance(item, int) for item in items):
        return torch.tensor(items, dtype=torch.int64, device=device)
    # sizes that are symbols while the graph is traced
    return torch.stack([torch.scalar_tensor(item, dtype=torch.int64, device=device) for item in items])


def shape_tensor(x: torch.Tensor, start: int = 0, end: int | None = None) -> torch.Tensor:
    """The shape of a tensor of unknown rank, as an int64 vector."""
    return ints_tensor(list(x.shape)[start:end], x)


def divide_ints(a: int, b: int) -> int:
    """Division that rounds toward zero, as ONNX divides integers."""
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def reshape(x: torch.Tensor, shape: Sequence[int], allow_zero: bool = False) -> torch.Tensor:
    """ONNX's Reshape: 0 keeps the dim at its place (unless `allow_zero`), -1 is inferred."""
    sizes = list(shape)
    if not allow_zero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    if -1 in sizes and x.numel() == 0:
        known = math.prod(size for size in sizes if size != -1)
        sizes = [(x.numel() // known if known else 0) if size == -1 else size for size in sizes]
    return x.reshape(sizes)


def expand(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """ONNX's Expand: broadcasting in both directions, so a 1 in `shape` keeps the dim of `x`."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))

"""Shapes and layouts that torch has no single function for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def flatten(x: torch.Tensor, axis: int) -> torch.Tensor:
    """A matrix: dims before `axis` are rows."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def arange(start: Any, limit: Any, delta: Any, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Range: empty where the step leads away."""
    if all(isinstance(number, int) for number in (start, limit, delta)) and (limit - start) * delta <= 0:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.arange(start, limit, delta, dtype=dtype, device=device)


def split_evenly(x: torch.Tensor, count: int, axis: int) -> tuple[torch.Tensor, ...]:
    """`count` parts of equal size, the last one smaller."""
    size = x.shape[axis]
    part = -(-size // count)
    return torch.split(x, [max(min(part, size - i * part), 0) for i in range(count)], axis)


def pad(
    x: torch.Tensor,
    begins: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int],
    mode: str,
    value: Any = 0,
) -> torch.Tensor:
    """ONNX's Pad along `axes`; negative amounts cut off.

    reflect, edge and wrap take their elements by index, for any number of axes and dtypes.
    """
    if mode == "constant":
        amounts = [0] * (2 * x.ndim)
        for axis, begin, end in zip(axes, begins, ends, strict=True):
            amounts[2 * (x.ndim - 1 - axis)], amounts[2 * (x.ndim - 1 - axis) + 1] = begin, end
        number = value.item() if isinstance(value, torch.Tensor) else value
        if x.dtype is torch.bool:
            return F.pad(x.to(torch.uint8), amounts, value=int(number)).to(torch.bool)
        return F.pad(x, amounts, value=number)
    for axis, begin, end in zip(axes, begins, ends, strict=True):
        if begin == 0 and end == 0:
            continue
        size = x.shape[axis]
        start, stop = max(-begin, 0), size - max(-end, 0)
        x = x.narrow(axis, start, stop - start)
        size = x.shape[axis]
        places = torch.arange(-max(begin, 0), size + max(end, 0), device=x.device)
        if mode == "edge":
            places = places.clamp(0, size - 1)
        elif mode == "wrap":
            places = places % size
        else:
            places = reflected(places, size)
        x = x.index_select(axis, places)
    return x


def reflected(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places mirrored at the first and the last element."""
    if size == 1:
        return torch.zeros_like(places)
    folded = places % (2 * (size - 1))
    return torch.where(folded >= size, 2 * (size - 1) - folded, folded)


def depth_to_space(x: torch.Tensor, block: int) -> torch.Tensor:
    """DepthToSpace in the order depth, column, row."""
    n, c, h, w = x.shape
    split = x.reshape(n, block, block, c // (block * block), h, w)
    return split.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (block * block), h * block, w * block)


def space_to_depth(x: torch.Tensor, block: int) -> torch.Tensor:
    """SpaceToDepth in the order row, column, depth."""
    n, c, h, w = x.shape
    split = x.reshape(n, c, h // block, block, w // block, block)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block * block, h // block, w // block)


def eye_like(x: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Ones on the k-th diagonal of a matrix of the shape of `x`."""
    rows, columns = x.shape
    grid = torch.arange(columns, device=x.device) - torch.arange(rows, device=x.device)[:, None]
    return (grid == k).to(dtype)


def columns_to_image(
    x: torch.Tensor,
    image: Sequence[int],
    block: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    strides: Sequence[int],
) -> torch.Tensor:
    """Col2Im for any number of spatial axes: every column [N, C * prod(block), L] is added where it was cut out."""
    spatial = len(block)
    padded = [size + pads[i] + pads[i + spatial] for i, size in enumerate(image)]
    steps = [(padded[i] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1 for i in range(spatial)]
    n, channels = x.shape[0], x.shape[1] // math.prod(block)
    flat = torch.zeros(1, dtype=torch.int64, device=x.device)
    stride = math.prod(padded)
    for i in range(spatial):
        stride //= padded[i]
        inside = torch.arange(block[i], device=x.device) * dilations[i]
        starts = torch.arange(steps[i], device=x.device) * strides[i]
        shape_in, shape_out = [1] * (2 * spatial), [1] * (2 * spatial)
        shape_in[i], shape_out[spatial + i] = block[i], steps[i]
        flat = flat + (inside.reshape(shape_in) + starts.reshape(shape_out)) * stride
    values = x.reshape(n, channels, math.prod(block) * x.shape[2])
    summed = torch.zeros(n, channels, math.prod(padded), dtype=x.dtype, device=x.device)
    summed = summed.index_add(2, flat.reshape(-1), values).reshape(n, channels, *padded)
    for i, size in enumerate(image):
        summed = summed.narrow(2 + i, pads[i], size)
    return summed


def squeeze(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Squeeze of axes that only the run tells."""
    return x.squeeze(tuple(axes))


def unsqueeze(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Unsqueeze of axes that only the run tells."""
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def pad_computed(
    x: torch.Tensor, pads: Sequence[int], axes: Sequence[int] | None, mode: str, value: Any
) -> torch.Tensor:
    """Pad of axes that only the run tells."""
    places = list(range(len(pads) // 2)) if axes is None else [axis % x.ndim for axis in axes]
    return pad(x, pads[: len(places)], pads[len(places) :], places, mode, value)

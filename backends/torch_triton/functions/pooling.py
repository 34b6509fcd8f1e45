"""Pooling with ONNX's paddings, dilations, ceil mode and indices, by windows that are cut out of the padded input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from xform.backends.torch_triton.functions.convolution import same_pads, torch_pads

Pads = str | Sequence[int]


def _amounts(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    ceil: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Pads (begins, ends) that make all windows whole, and the number of windows along each axis.

    A window of ceil mode that would start in the end padding is left out.
    """
    count = len(kernel)
    given = same_pads(sizes, kernel, strides, dilations, pads == "SAME_UPPER") if isinstance(pads, str) else list(pads)
    begins, ends, windows = given[:count], [], []
    for i, size in enumerate(sizes):
        span = dilations[i] * (kernel[i] - 1) + 1
        room = size + given[i] + given[i + count] - span
        number = (-(-room // strides[i]) if ceil else room // strides[i]) + 1
        if ceil and (number - 1) * strides[i] >= size + given[i]:
            number -= 1
        windows.append(number)
        ends.append((number - 1) * strides[i] + span - size - given[i])
    return begins, ends, windows


def _cut(x: torch.Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> torch.Tensor:
    """All windows of a padded tensor: [N, C, *windows, prod(kernel)]."""
    count = len(kernel)
    for i in range(count):
        span = dilations[i] * (kernel[i] - 1) + 1
        if x.shape[2 + i] < span:  # no window at all, which torch refuses
            x = x.new_empty((*x.shape[: 2 + i], 0, *x.shape[3 + i :], span))
        else:
            x = x.unfold(2 + i, span, strides[i])
    for i in range(count):
        x = x[(slice(None),) * (2 + count + i) + (slice(None, None, dilations[i]),)]
    return x.flatten(2 + count)


def _padded(x: torch.Tensor, begins: Sequence[int], ends: Sequence[int], value: Any) -> torch.Tensor:
    amounts = torch_pads([*begins, *ends])
    return F.pad(x, amounts, value=value) if any(amounts) else x


def max_pool(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    ceil: bool,
    want_indices: bool,
    column_major: bool,
) -> tuple[torch.Tensor, ...]:
    """MaxPool; the indices are places in the whole input [N, C, ...], flat."""
    begins, ends, _ = _amounts(x.shape[2:], kernel, strides, pads, dilations, ceil)
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    windows = _cut(_padded(x, begins, ends, lowest), kernel, strides, dilations)
    values, which = windows.max(-1)
    if not want_indices:
        return (values,)
    places = torch.arange(x[0, 0].numel(), device=x.device).reshape(x.shape[2:])
    if column_major:
        places = places.reshape(-1).argsort().reshape(x.shape[2:][::-1]).permute(*reversed(range(x.ndim - 2)))
    flat = _cut(_padded(places[None, None], begins, ends, -1), kernel, strides, dilations)
    inside = torch.gather(flat.expand(windows.shape), -1, which[..., None])[..., 0]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * places.numel()
    return values, inside + planes.reshape(x.shape[0], x.shape[1], *[1] * (x.ndim - 2))


def average_pool(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    ceil: bool,
    include_pad: bool,
) -> torch.Tensor:
    """AveragePool; what ceil mode adds beyond the declared pads never counts."""
    begins, ends, _ = _amounts(x.shape[2:], kernel, strides, pads, dilations, ceil)
    total = _cut(_padded(x, begins, ends, 0), kernel, strides, dilations).sum(-1)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if include_pad:
        count = len(kernel)
        declared = (
            same_pads(x.shape[2:], kernel, strides, dilations, pads == "SAME_UPPER") if isinstance(pads, str) else pads
        )
        ends_inside = [min(declared[i + count], ends[i]) for i in range(count)]
        ones = _padded(ones, begins, ends_inside, 1)
        ends = [end - inside for end, inside in zip(ends, ends_inside, strict=True)]
        begins = [0] * count
    return total / _cut(_padded(ones, begins, ends, 0), kernel, strides, dilations).sum(-1)


def lp_pool(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    ceil: bool,
    p: int,
) -> torch.Tensor:
    """LpPool: the p-norm of every window."""
    begins, ends, _ = _amounts(x.shape[2:], kernel, strides, pads, dilations, ceil)
    windows = _cut(_padded(x, begins, ends, 0), kernel, strides, dilations)
    return windows.abs().pow(p).sum(-1).pow(1 / p)


def global_lp_pool(x: torch.Tensor, axes: Sequence[int], p: int) -> torch.Tensor:
    """GlobalLpPool."""
    return x.abs().pow(p).sum(list(axes), keepdim=True).pow(1 / p)


def max_unpool(
    x: torch.Tensor,
    places: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """MaxUnpool: values at their flat places in the unpooled tensor, zeros elsewhere.

    The places count in the inferred shape; a larger given shape is filled from its beginning.
    """
    count = len(kernel)
    inferred = [(size - 1) * strides[i] - pads[i] - pads[i + count] + kernel[i] for i, size in enumerate(x.shape[2:])]
    small = [*x.shape[:2], *inferred]
    flat = torch.zeros(math.prod(small), dtype=x.dtype, device=x.device)
    filled = flat.scatter(0, places.reshape(-1), x.reshape(-1)).reshape(small)
    if shape is None or list(shape) == small:
        return filled
    return F.pad(filled, torch_pads([0] * count + [w - s for w, s in zip(shape[2:], inferred, strict=True)]))

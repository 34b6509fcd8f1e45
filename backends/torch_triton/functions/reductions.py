"""Reductions that torch has no single function for. `axes` are sorted and not negative."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def prod(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Product."""
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keepdims, dtype=x.dtype)
    return x


def l1(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Sum of absolute values."""
    return x.abs().sum(tuple(axes), keepdim=keepdims, dtype=x.dtype)


def l2(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Root of the sum of squares."""
    wide = x if x.is_floating_point() else x.to(torch.float64)
    return wide.square().sum(tuple(axes), keepdim=keepdims).sqrt().to(x.dtype)


def log_sum(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Logarithm of the sum."""
    return x.sum(tuple(axes), keepdim=keepdims).log().to(x.dtype)


def sum_square(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Sum of squares."""
    return x.square().sum(tuple(axes), keepdim=keepdims, dtype=x.dtype)


def integer_sum(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Sum in the type of `x`; torch would widen it to int64."""
    return x.to(torch.int64).sum(tuple(axes), keepdim=keepdims).to(x.dtype)


def integer_mean(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Mean rounded toward zero."""
    count = math.prod(x.shape[axis] for axis in axes)
    total = x.to(torch.int64).sum(tuple(axes), keepdim=keepdims)
    return torch.div(total, count, rounding_mode="trunc").to(x.dtype)


def extreme(x: torch.Tensor, axes: Sequence[int], keepdims: bool, greatest: bool) -> torch.Tensor:
    """Maximum or minimum of booleans, or of what may be empty: then the bound of the type."""
    if x.dtype is torch.bool:
        for axis in sorted(axes, reverse=True):
            x = (torch.any if greatest else torch.all)(x, axis, keepdim=keepdims)
        return x
    if all(x.shape[axis] for axis in axes):
        return (torch.amax if greatest else torch.amin)(x, tuple(axes), keepdim=keepdims)
    shape = [1 if i in axes else size for i, size in enumerate(x.shape) if keepdims or i not in axes]
    if x.is_floating_point():
        return torch.full(shape, -math.inf if greatest else math.inf, dtype=x.dtype, device=x.device)
    limits = torch.iinfo(x.dtype)
    return torch.full(shape, limits.min if greatest else limits.max, dtype=x.dtype, device=x.device)


def arg_extreme(x: torch.Tensor, axis: int, keepdims: bool, last: bool, greatest: bool) -> torch.Tensor:
    """Place of the first (or `last`) maximum or minimum."""
    function = torch.argmax if greatest else torch.argmin
    if not last:
        return function(x, axis, keepdim=keepdims)
    return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keepdims)


def cumulative(x: torch.Tensor, axis: int, exclusive: bool, reverse: bool, product: bool) -> torch.Tensor:
    """Running sum or product; `exclusive` leaves the element itself out."""
    forward = x.flip(axis) if reverse else x
    function = torch.cumprod if product else torch.cumsum
    result = function(forward, axis, dtype=x.dtype)
    if exclusive:
        first = min(1, x.shape[axis])  # of nothing there is no first one
        start = torch.full_like(result.narrow(axis, 0, first), 1 if product else 0)
        result = torch.cat((start, result.narrow(axis, 0, x.shape[axis] - first)), axis)
    return result.flip(axis) if reverse else result


def log_sum_exp(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Logarithm of the sum of exponentials."""
    return torch.logsumexp(x, tuple(axes), keepdim=keepdims)


def total(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Sum in the type of `x`."""
    return x.sum(tuple(axes), keepdim=keepdims, dtype=x.dtype)


def mean(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Mean in the type of `x`."""
    return x.mean(tuple(axes), keepdim=keepdims) if x.is_floating_point() else integer_mean(x, axes, keepdims)


def maximum(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Maximum, of nothing too."""
    return extreme(x, axes, keepdims, True)


def minimum(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """Minimum, of nothing too."""
    return extreme(x, axes, keepdims, False)


_BY_NAME = {
    "ReduceSum": total, "ReduceMean": mean, "ReduceMax": maximum, "ReduceMin": minimum, "ReduceProd": prod,
    "ReduceL1": l1, "ReduceL2": l2, "ReduceLogSum": log_sum, "ReduceSumSquare": sum_square,
    "ReduceLogSumExp": log_sum_exp,
}  # fmt: skip
_ALONE = {"ReduceL1": torch.abs, "ReduceL2": torch.abs, "ReduceLogSum": torch.log, "ReduceSumSquare": torch.square}


def over(kind: str, x: torch.Tensor, axes: Sequence[int], keepdims: bool, noop: bool) -> torch.Tensor:
    """The reduction of that name over axes that only the run tells; none are all, or (`noop`) none."""
    if not axes and noop:
        return _ALONE[kind](x) if kind in _ALONE else x
    places = sorted(axis % x.ndim for axis in axes) if axes else list(range(x.ndim))
    return _BY_NAME[kind](x, places, keepdims)

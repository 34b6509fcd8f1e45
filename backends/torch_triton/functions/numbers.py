"""Arithmetic that torch has no single function for."""

from __future__ import annotations

import torch


def least(a: int, b: int) -> int:
    """The smaller size; `torch.sym_min` keeps it symbolic while traced."""
    return torch.sym_min(a, b)


def greatest(a: int, b: int) -> int:
    """The larger size."""
    return torch.sym_max(a, b)


def power(base: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Pow of two types, in the wider of both; a negative power of an integer is what its float power rounds to."""
    if not base.is_floating_point() and not exponent.is_floating_point():
        wide = torch.pow(base.to(torch.int64), exponent.to(torch.int64).clamp(min=0))
        small = torch.pow(base.to(torch.float64), exponent.to(torch.float64)).trunc()
        return torch.where(exponent >= 0, wide, small.nan_to_num(posinf=0, neginf=0).to(torch.int64))
    wider = torch.promote_types(base.dtype, exponent.dtype)
    if wider in (torch.float16, torch.bfloat16) and not (base.is_floating_point() and exponent.is_floating_point()):
        wider = torch.float32
    return torch.pow(base.to(wider), exponent.to(wider))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A Cast of numbers to integers, cut toward zero and wrapped around, as C does through int64."""
    if x.is_floating_point() and not dtype.is_floating_point and dtype is not torch.bool:
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


def cast_like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A Cast to the dtype of another tensor."""
    return cast(x, other.dtype)


def cast_float8(x: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    """A Cast to float8: beyond the range the largest number (`saturate`), else infinity or NaN."""
    limits = torch.finfo(dtype)
    wide = x.to(torch.float32)
    if saturate:
        return torch.where(torch.isnan(wide), wide, wide.clamp(limits.min, limits.max)).to(dtype)
    if dtype is torch.float8_e4m3fn:  # torch saturates here; what rounds beyond 448 has no number
        wide = torch.where(wide.abs() > 464, torch.nan, wide)
    return wide.to(dtype)


def thresholded(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """x where it exceeds alpha, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(x: torch.Tensor, lambd: float, bias: float) -> torch.Tensor:
    """Shrink: x + bias below -lambd, x - bias above lambd, 0 between."""
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to a dtype of less range: what is beyond becomes its largest number, but for infinities."""
    limits = torch.finfo(dtype)
    return torch.where(torch.isinf(x), x, x.clamp(limits.min, limits.max)).to(dtype)

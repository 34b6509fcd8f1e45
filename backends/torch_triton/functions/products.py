"""Products of integer matrices."""

from __future__ import annotations

import torch


def integer_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """MatMul of integers, exact modulo the width of their type."""
    return _exact(a, b).to(a.dtype)


def integer_gemm(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, alpha: float, beta: float) -> torch.Tensor:
    """alpha a b + beta c of integers."""
    product = _exact(a, b)
    result = product if alpha == 1 else product * alpha
    if c is not None:
        result = result + (c.to(torch.int64) if beta == 1 else c * beta)
    return result.to(a.dtype)


def _exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in int64."""
    if not a.is_cuda:
        return torch.matmul(a.to(torch.int64), b.to(torch.int64))
    if a.dtype.itemsize == 1 and b.dtype.itemsize == 1:  # see matmul_integer
        return torch.matmul(a.to(torch.float64), b.to(torch.float64)).to(torch.int64)
    # torch has no products of wide integers on a GPU, and no float holds their sums
    return torch.matmul(a.cpu().to(torch.int64), b.cpu().to(torch.int64)).to(a.device)


def widened(x: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """x - zero in int32; a zero point [M] of rows stands in the last but one axis."""
    wide = x.to(torch.int32)
    return wide if zero is None else wide - zero.to(torch.int32)


def matmul_integer(
    a: torch.Tensor, b: torch.Tensor, a_zero: torch.Tensor | None = None, b_zero: torch.Tensor | None = None
) -> torch.Tensor:
    """MatMulInteger: (a - a_zero) (b - b_zero) in int32, with a zero point for each row of a and column of b."""
    if a_zero is not None and a_zero.ndim == 1 and a_zero.numel() > 1:
        a_zero = a_zero[:, None]
    left, right = widened(a, a_zero), widened(b, b_zero)
    if not a.is_cuda:
        return torch.matmul(left, right)
    # |products| < 2^17 and float64 has 53 bits: exact for up to 2^36 summands
    return torch.matmul(left.to(torch.float64), right.to(torch.float64)).to(torch.int32)

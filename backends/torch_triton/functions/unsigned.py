"""uint16, uint32 and uint64, for which torch has few kernels: computed in int64, where their bits are the same.

Sums, products and left shifts modulo 2^64 do not depend on the sign. Orders do: adding 2^63 (flipping the top bit)
maps the order of uint64 to that of int64. uint8 has kernels of its own and comes here for shifts only.
"""

from __future__ import annotations

import operator

import torch

_TOP = -(2**63)


def wide(x: torch.Tensor) -> torch.Tensor:
    """The number as int64; a uint64 beyond 2^63 as its bits."""
    return x.view(torch.int64) if x.dtype is torch.uint64 else x.to(torch.int64)


def narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Back from int64, modulo the width of `dtype`."""
    return x.contiguous().view(torch.uint64) if dtype is torch.uint64 else x.to(dtype)


def apply(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A function of module `operator` whose bits do not depend on the sign."""
    return narrow(getattr(operator, name)(wide(a), wide(b)), a.dtype)


def unary(name: str, x: torch.Tensor) -> torch.Tensor:
    """Abs (the identity), Sign and BitwiseNot."""
    if name == "Abs":
        return x
    if name == "Sign":
        return narrow((wide(x) != 0).to(torch.int64), x.dtype)
    return narrow(~wide(x), x.dtype)


def _key(x: torch.Tensor) -> torch.Tensor:
    """An int64 in the order of the unsigned numbers."""
    return wide(x) ^ _TOP if x.dtype is torch.uint64 else wide(x)


def compare(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A comparison of module `operator`."""
    return getattr(operator, name)(_key(a), _key(b))


def minimum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Min of two."""
    return narrow(torch.where(_key(a) < _key(b), wide(a), wide(b)), a.dtype)


def maximum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Max of two."""
    return narrow(torch.where(_key(a) > _key(b), wide(a), wide(b)), a.dtype)


def clip(x: torch.Tensor, low: torch.Tensor | None, high: torch.Tensor | None) -> torch.Tensor:
    """Clip."""
    x = x if low is None else maximum(x, low)
    return x if high is None else minimum(x, high)


def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a // b of unsigned numbers.

    uint64 has no division in int64 once the top bit is set: q = ((a >> 1) // b) << 1 is at most one too small, which
    the remainder tells; a divisor with the top bit goes into a once or never.
    """
    if a.dtype is not torch.uint64:
        return narrow(torch.div(wide(a), wide(b), rounding_mode="floor"), a.dtype)
    x, y = torch.broadcast_tensors(wide(a), wide(b))
    safe = torch.where(y > 0, y, torch.ones_like(y))
    quotient = torch.div((x >> 1) & ~torch.tensor(_TOP), safe, rounding_mode="floor") << 1
    rest = x - quotient * safe
    quotient = quotient + ((rest ^ _TOP) >= (safe ^ _TOP)).to(torch.int64)
    once = ((x ^ _TOP) >= (y ^ _TOP)).to(torch.int64)
    return narrow(torch.where(y > 0, quotient, once), a.dtype)


def modulo(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a mod b of unsigned numbers."""
    return narrow(wide(a) - wide(divide(a, b)) * wide(b), a.dtype)


def shift(x: torch.Tensor, count: torch.Tensor, left: bool) -> torch.Tensor:
    """BitShift; a right shift fills with zeros."""
    bits, by = wide(x), wide(count)
    if left:
        return narrow(bits << by, x.dtype)
    if x.dtype is not torch.uint64:
        return narrow(bits >> by, x.dtype)
    mask = torch.where(by > 0, ~(torch.tensor(-1) << (64 - by.clamp(min=1))), torch.tensor(-1))
    return narrow((bits >> by) & mask, x.dtype)

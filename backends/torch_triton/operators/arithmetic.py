"""Arithmetic by element."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from xform.backends.torch_triton.functions import numbers, sizes, unsigned
from xform.backends.torch_triton.lower.site import Ints, Item, Site
from xform.backends.torch_triton.lower.table import lowers

UNSIGNED = {ir.DataType.UINT16: torch.uint16, ir.DataType.UINT32: torch.uint32, ir.DataType.UINT64: torch.uint64}
_BINARY: dict[str, Callable[..., Any]] = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}
_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Log": torch.log, "Neg": operator.neg,
    "Reciprocal": torch.reciprocal, "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "IsNaN": torch.isnan, "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not,
}  # fmt: skip


def operands(site: Site) -> tuple[Any, Any]:
    """Both inputs, a scalar constant as a number unless both are."""
    left, right = site.operand(0), site.operand(1)
    if not hasattr(left, "meta") and not hasattr(right, "meta"):
        return site.tensor(0), right
    return left, right


def both_ints(site: Site) -> tuple[Ints, Ints] | None:
    """Both inputs as Python ints, if they are sizes; the shorter one repeated."""
    if not (site.has_ints(0) and site.has_ints(1)):
        return None
    left, right = site.demand_ints(0), site.demand_ints(1)
    count = max(len(left.items), len(right.items))
    if len(left.items) not in (1, count) or len(right.items) not in (1, count) or count == 0:
        return None
    scalar = left.is_scalar and right.is_scalar
    spread = [Ints(i.items * count if len(i.items) == 1 else i.items, scalar) for i in (left, right)]
    return spread[0], spread[1]


def on_ints(site: Site, function: Callable[[int, int], Any]) -> Ints | None:
    """The operator on sizes, in Python."""
    pair = both_ints(site)
    if pair is None:
        return None
    return Ints(
        tuple(item_of(site, function, a, b) for a, b in zip(*(p.items for p in pair), strict=True)), pair[0].is_scalar
    )


def item_of(site: Site, function: Callable[[int, int], Any], a: Item, b: Item) -> Item:
    """One element: computed now if both are known."""
    if isinstance(a, int) and isinstance(b, int):
        return int(function(a, b))
    if function is operator.mul and 1 in (a, b):
        return b if a == 1 else a
    if function in (operator.add, operator.sub) and b == 0:
        return a
    return site.call(function, a, b)


@lowers("Add", "Sub", "Mul")
def binary(site: Site) -> Any:
    function = _BINARY[site.node.op_type]
    found = on_ints(site, function)
    if found is not None:
        return found
    if site.dtype() in UNSIGNED:
        return site.call(unsigned.apply, function.__name__, site.tensor(0), site.tensor(1))
    return site.call(function, *operands(site))


@lowers("Div")
def divide(site: Site) -> Any:
    if site.is_float():
        return site.call(operator.truediv, *operands(site))
    found = on_ints(site, sizes.divide_ints) if not _has_zero(site) else None
    if found is not None:
        return found
    if site.dtype() in UNSIGNED:
        return site.call(unsigned.divide, site.tensor(0), site.tensor(1))
    return site.call(torch.div, *operands(site), rounding_mode="trunc")


def _has_zero(site: Site) -> bool:
    found = site.known(1)
    return found is not None and bool((found == 0).any())


@lowers("Mod")
def modulo(site: Site) -> Any:
    if site.dtype() in UNSIGNED:
        return site.call(unsigned.modulo, site.tensor(0), site.tensor(1))
    if site.attr("fmod", 0):
        return site.call(torch.fmod, *operands(site))
    found = on_ints(site, operator.mod) if not _has_zero(site) and not site.is_float() else None
    return found or site.call(torch.remainder, *operands(site))


@lowers("Pow")
def power(site: Site) -> Any:
    base, exponent = site.tensor(0), site.operand(1)
    dtype = site.dtype()
    if not hasattr(exponent, "meta") and exponent == 2 and site.is_float():
        return site.call(torch.square, base)
    if site.dtype(0) == site.dtype(1) and site.is_float():
        return site.call(torch.pow, base, exponent)
    result = site.call(numbers.power, base, site.tensor(1))
    return result if dtype is None else site.call(torch.Tensor.to, result, site.torch_dtype(dtype))


@lowers(*_UNARY)
def unary(site: Site) -> Any:
    if site.node.op_type == "Neg" and site.has_ints(0):
        ints = site.demand_ints(0)
        return Ints(tuple(-i if isinstance(i, int) else site.call(operator.neg, i) for i in ints.items), ints.is_scalar)
    if site.dtype() in UNSIGNED:
        return site.call(unsigned.unary, site.node.op_type, site.tensor())
    if site.node.op_type in ("Ceil", "Floor", "Round") and not site.is_float():
        return site.tensor()
    return site.call(_UNARY[site.node.op_type], site.tensor())


@lowers("IsInf")
def is_infinite(site: Site) -> Any:
    negative, positive = site.attr("detect_negative", 1), site.attr("detect_positive", 1)
    function = {(1, 1): torch.isinf, (0, 1): torch.isposinf, (1, 0): torch.isneginf}.get((negative, positive))
    if function is None:
        return site.call(torch.zeros_like, site.tensor(), dtype=torch.bool)
    x = site.tensor()
    if site.dtype() in (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2):
        x = site.call(torch.Tensor.float, x)
    return site.call(function, x)


@lowers("Min", "Max")
def extreme(site: Site) -> Any:
    least = site.node.op_type == "Min"
    if len(site.node.inputs) == 2 and site.node.outputs[0].dtype is ir.DataType.INT64:
        found = on_ints(site, numbers.least if least else numbers.greatest)
        if found is not None:
            return found
    if site.dtype() in UNSIGNED:
        return _fold(site, unsigned.minimum if least else unsigned.maximum)
    if len(site.node.inputs) == 2 and site.rank(0) is not None:
        bound = _bound(site, 1)
        if bound is not None:
            return site.call(torch.clamp, site.tensor(0), **{"max" if least else "min": bound})
    return _fold(site, torch.minimum if least else torch.maximum)


def _bound(site: Site, index: int) -> Any:
    """A number to clamp with; NaN passes through clamp as through Min and Max."""
    number = site.number(index)
    return (
        number if number is not None and number == number and (site.rank(0) or 0) >= (site.rank(index) or 0) else None
    )


def _fold(site: Site, function: Callable[..., Any]) -> Any:
    first, *rest = site.tensors()
    for other in rest:
        first = site.call(function, first, other)
    return first if rest else site.call(torch.clone, first)


@lowers("Sum")
def total(site: Site) -> Any:
    return _fold(site, operator.add)


@lowers("Mean")
def mean(site: Site) -> Any:
    return site.call(operator.truediv, _fold(site, operator.add), len(site.node.inputs))


@lowers("Clip")
def clip(site: Site) -> Any:
    low = site.operand(1) if site.has(1) else site.attr("min")
    high = site.operand(2) if site.has(2) else site.attr("max")
    if low is None and high is None:
        return site.tensor()
    if site.dtype() in UNSIGNED:
        return site.call(unsigned.clip, site.tensor(), site.optional(1), site.optional(2))
    tensors = hasattr(low, "meta") or hasattr(high, "meta")
    if tensors:
        low, high = site.optional(1), site.optional(2)
        if low is not None and high is not None:
            return site.call(torch.minimum, site.call(torch.maximum, site.tensor(), low), high)
        return site.call(torch.clamp, site.tensor(), low, high)
    if low is not None and high is not None and low > high:
        return site.call(torch.full_like, site.tensor(), high)
    return site.call(torch.clamp, site.tensor(), low, high)


@lowers("BitShift")
def shift(site: Site) -> Any:
    left = site.attr("direction") == "LEFT"
    if site.dtype() in UNSIGNED or site.dtype() is ir.DataType.UINT8:
        return site.call(unsigned.shift, site.tensor(0), site.tensor(1), left)
    return site.call(torch.bitwise_left_shift if left else torch.bitwise_right_shift, *operands(site))


@lowers("Det")
def determinant(site: Site) -> Any:
    return site.call(torch.linalg.det, site.tensor())

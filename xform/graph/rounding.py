"""Rounding folded constants: float64 to the dtype of a graph, once, and what must not be lost by it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from xform.graph.values import Array


def narrowed(array: Array, dtype: ir.DataType) -> ir.TensorProtocol:
    """A float64 array as a tensor of `dtype`, rounded once."""
    with np.errstate(over="ignore", under="ignore"):
        return ir.tensor(np.ascontiguousarray(array.astype(dtype.numpy())), dtype=dtype)


def rounding_loss(array: Array, dtype: ir.DataType, *, summand: bool = False) -> str | None:
    """What rounding a float64 array to `dtype` would destroy, in words; None if it only rounds.

    Args:
        array: float64, of any shape.
        summand: Numbers that are added. That they are small beside what they are added to is no loss. Factors must have
            a largest one that `dtype` holds with its full precision, which it does not below its smallest normal
            number (6e-5 in float16).
    """
    if array.size == 0 or not dtype.is_floating_point():
        return None
    largest, limits = float(np.abs(array).max()), ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    if not np.isfinite(largest):
        return "is not finite"
    if largest > float(limits.max) * (1 + float(limits.eps) / 4):
        return f"overflows {dtype.name}"
    if not summand and 0 < largest < float(limits.smallest_normal):
        return f"is too small for {dtype.name}"
    return None


def folding_loss(weight: Array, bias: Array | None, dtype: ir.DataType) -> str | None:
    """`rounding_loss` of a weight and of what is added to its product."""
    return rounding_loss(weight, dtype) or (None if bias is None else rounding_loss(bias, dtype, summand=True))

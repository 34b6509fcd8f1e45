"""Reading reduction axes."""

from __future__ import annotations

import onnx_ir as ir

from xform.graph.values import constant, rank_of, shape_of


def reduction_axes(axes: ir.Value, x: ir.Value) -> tuple[int, ...] | None:
    """Sorted non-negative axes of a reduction of `x`; None where the rank or the axes are unknown."""
    array, rank = constant(axes), rank_of(x)
    if array is None or rank is None or array.size == 0:
        return None
    return tuple(sorted(int(a) % rank for a in array.reshape(-1)))


def trailing_dims(x: ir.Value, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Static sizes of `axes` where they are the last ones of `x` without a gap; None otherwise."""
    shape = shape_of(x)
    if shape is None or axes != tuple(range(len(shape) - len(axes), len(shape))):
        return None
    dims = shape[len(shape) - len(axes) :]
    return tuple(d for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else None

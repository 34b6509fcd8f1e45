"""Scales that an error is held against: of the output, of a value's slice, or of the values around it.

The largest number of an output says nothing about its other parts: probabilities beside logits, a row of zeros, a
masked row. So an exact rewrite is judged by what lies around each value.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from xform.graph.values import Array

Scope = Literal["output", "slice", "neighbourhood"]

_REACH = 4  # values on either side; more would let one part of a concatenation excuse the other
_OUTLIER = 1000.0  # times the median: what lies above is a fill (-3.4e38), not a scale


def scales(magnitude: Array, scope: Scope) -> Array:
    """For every value the scale that its error is held against.

    Args:
        magnitude: Absolute values, 0 where they are not finite; any shape.
        scope: "output" for one scale, `min(max, 1000 * median of the nonzero)`; "slice" for the largest value of each
            slice along the last axis; "neighbourhood" for `largest_nearby`. The scale of the output is a cap on both.

    Returns:
        Array that broadcasts to the shape of `magnitude`.
    """
    cap = _output_scale(magnitude)
    if scope == "output" or magnitude.ndim == 0:
        return np.asarray(cap)
    if scope == "slice":
        return np.asarray(np.minimum(magnitude.max(axis=-1, keepdims=True, initial=0.0), cap))
    return np.asarray(np.minimum(largest_nearby(magnitude), cap))


def largest_nearby(magnitude: Array) -> Array:
    """For every value the largest among it and its neighbours: along the last axis, or across, whichever is smaller.

    Neighbours are four values on either side. Across means along the other axes, flattened; that is left out where
    there are fewer than nine slices. Two directions, because parts of different scale are concatenated or interleaved
    along either.
    """
    if magnitude.size == 0 or magnitude.ndim == 0:
        return magnitude
    rows = magnitude.reshape(-1, magnitude.shape[-1])
    wide = 2 * _REACH + 1
    along = _window(rows, 1) if rows.shape[1] > 1 else None
    across = _window(rows, 0) if rows.shape[0] >= wide or along is None else None
    found = across if along is None else along if across is None else np.minimum(along, across)
    assert found is not None
    return found.reshape(magnitude.shape)


def _window(rows: Array, axis: int) -> Array:
    """The largest value within reach along an axis of a matrix."""
    found = rows.copy()
    for shift in range(1, min(_REACH, rows.shape[axis] - 1) + 1):
        ahead, behind = [slice(None)] * 2, [slice(None)] * 2
        ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
        np.maximum(found[tuple(behind)], rows[tuple(ahead)], out=found[tuple(behind)])
        np.maximum(found[tuple(ahead)], rows[tuple(behind)], out=found[tuple(ahead)])
    return found


def _output_scale(magnitude: Array) -> float:
    """`min(max, 1000 * median of the nonzero)` of magnitudes."""
    nonzero = magnitude[magnitude > 0]
    if nonzero.size == 0:
        return 0.0
    return float(min(nonzero.max(), _OUTLIER * np.median(nonzero)))

"""Numbers per channel that move an activation around zero, chosen on calibration batches for each activation.

Candidates for X: the middle between the quantiles at 5 and 95 % of every channel, its mean, and one number for all
channels, up to a fifth of the mean magnitude of rows: what follows GELU has most of its numbers just below zero and few
large ones, so that the middle of a channel says little. The measure is the error of the product, ||(G(x - c) - (x - c))
W|| / ||x W||, over a sample of rows x, G rounding to int8 by groups of channels (`passes.integer.grouped_products`). It
is relative in every row, since norms make rows of all sizes count the same; without that a few huge ones (the first
token, or the last) would decide. What rounding of W adds, compensation takes away (`xform.pipeline.rounding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from xform.graph.channel_groups import LARGEST_CODE
from xform.graph.values import Array
from xform.pipeline.channel_factors import sampled_products
from xform.pipeline.oracle import Inputs

_ROWS = 512  # of each activation
_QUANTILES = (0.05, 0.95)
_PARTS = (0.02, 0.05, 0.1, 0.2)  # of the mean magnitude of rows
_SMALL = 1e-3  # times the mean: rows below are as good as zero
_WORTH = 0.95


def channel_shifts(model: ir.Model, batches: Sequence[Inputs], group: int) -> dict[str, Array]:
    """Shifts by activation, where they lower the error by a twentieth; float64 [K].

    Args:
        model: The graph before quantization.
        batches: Inputs by name.
        group: Input channels that share a scale; activations whose channels it does not divide are left out.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    found = {}
    for value, rows, weight, _ in sampled_products(model, batches, _ROWS):
        if rows.shape[1] % group == 0 and np.isfinite(rows).all():
            shifts = _best(rows, weight, group)
            if shifts is not None:
                found[value.name or ""] = shifts
    return found


def _best(rows: Array, weight: Array, group: int) -> Array | None:
    sizes = np.linalg.norm(rows @ weight, axis=1)
    sizes = np.maximum(sizes, float(sizes.mean()) * _SMALL)

    def error(c: Array | float) -> float:
        moved = (rows - c).astype(np.float32)
        return float(np.linalg.norm(np.linalg.norm(_rounding(moved, group) @ weight, axis=1) / sizes))

    least, shifts = min(((error(c), c) for c in _candidates(rows)), key=lambda entry: entry[0])
    return shifts if least <= _WORTH * error(0.0) else None


def _rounding(x: Array, group: int) -> Array:
    """What rounding to int8 by groups changes."""
    blocks = x.reshape(len(x), -1, group)
    scale = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True) / LARGEST_CODE, np.finfo(np.float32).tiny)
    result: Array = (np.rint(blocks / scale) * scale - blocks).reshape(x.shape)
    return result


def _candidates(rows: Array) -> Iterator[Array]:
    yield np.quantile(rows, _QUANTILES, axis=0).mean(axis=0)
    yield rows.mean(axis=0, dtype=np.float64)
    for part in _PARTS:
        yield np.full(rows.shape[1], part * float(np.abs(rows).max(axis=1).mean()))

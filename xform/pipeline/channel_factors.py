"""Factors per channel that make an activation easier to quantize, chosen on calibration batches for each activation.

Candidates for X with channel peaks p_j and weights with row peaks w_j, all divided by s_j:
- SmoothQuant, s_j = p_j^a / w_j^(1 - a) for a = 0.3, 0.5 and 0.75;
- caps, s_j = max(1, p_j / (c median(p))) for c = 1.5 and 3: only the few channels that stand out are made smaller, and
  the weights of all others stay as they are. What follows an activation function needs that: SmoothQuant enlarges its
  many small channels together with their rare large values.
The measure is ||Q(X / s) Q(s W) - X W|| on a sample of rows, with the codes that the products will use. A candidate
counts only if it lowers that by a fifth, since the division costs a pass over X.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, constant
from xform.passes.integer.quantize_static import activation_codes
from xform.passes.integer.scale_channels import product_readers
from xform.passes.integer.weight_codes import dot_product_instructions, weight_codes
from xform.passes.normalize.migrate_scales import migration_scales
from xform.passes.normalize.ranges import ChannelRange
from xform.pipeline.calibration import observe
from xform.pipeline.oracle import Inputs

_ALPHAS = (0.3, 0.5, 0.75)
_CAPS = (1.5, 3.0)  # times the median peak
_WORTH = 0.8
_ROWS = 192  # of each activation
_COLUMNS = 512  # of the weights that read it
_SMALLEST = 1 << 13  # weights: products below stay in float


def channel_factors(
    model: ir.Model, batches: Sequence[Inputs], bits: int = 0, *, per_row: bool = False
) -> dict[str, Array]:
    """Factors by activation, where they pay; float64 [K].

    Args:
        model: The graph before quantization.
        batches: Inputs by name.
        bits: Of the weights: 8, 7, or 0 for what the passes take on this machine.
        per_row: Whether each row of an activation will have a scale of its own; weaker factors do then.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    bits = bits or (8 if dot_product_instructions() else 0)
    found = {}
    for value, rows, columns, span in sampled_products(model, batches, _ROWS):
        factors = _best(rows, columns, span, bits, per_row)
        if factors is not None:
            found[value.name or ""] = factors
    return found


def sampled_products(
    model: ir.Model, batches: Sequence[Inputs], count: int
) -> Iterator[tuple[ir.Value, Array, Array, ChannelRange]]:
    """What products with constant weights read: the value, about `count` rows [M, K] of it, columns [K, N] of all
    weights that multiply it, and its range per channel over all rows.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    weights = {value: columns for value in _activations(model) if (columns := _weights(value)) is not None}
    spans: dict[ir.Value, ChannelRange] = {}
    samples: dict[ir.Value, list[Array]] = {value: [] for value in weights}
    each = -(-count // max(len(batches), 1))
    for arrays in observe(model, batches, list(weights)):
        for value, array in zip(weights, arrays, strict=True):
            if not np.size(array):
                continue
            rows = np.reshape(array, (-1, np.shape(array)[-1]))
            here = ChannelRange(rows.min(axis=0), rows.max(axis=0))
            spans[value] = spans[value].joined(here) if value in spans else here
            samples[value].append(rows[:: max(1, len(rows) // each)][:each])
    for value, columns in weights.items():
        if not samples[value]:
            continue  # no batch has any rows of it
        yield value, np.concatenate(samples[value]), columns, spans[value]


def _activations(model: ir.Model) -> list[ir.Value]:
    """What products with constant weights read, computed in the main graph."""
    values = (node.inputs[0] for node in model.graph if node.op_type == "MatMul")
    return list(dict.fromkeys(v for v in values if v is not None and v.producer() is not None and product_readers(v)))


def _weights(value: ir.Value) -> Array | None:
    """Columns of the weights that read an activation, [K, N]; None where they are too few to quantize."""
    arrays = [array for node in product_readers(value) if (array := constant(node.inputs[1])) is not None]
    together = np.concatenate(arrays, axis=1)
    if max(array.size for array in arrays) < _SMALLEST or not bool(np.isfinite(together).all()):
        return None
    return np.ascontiguousarray(together[:, :: max(1, together.shape[1] // _COLUMNS)])


def _best(rows: Array, weight: Array, span: ChannelRange, bits: int, per_row: bool) -> Array | None:
    if not (np.isfinite(span.low).all() and np.isfinite(span.high).all()):
        return None
    exact = rows @ weight

    def error(s: Array) -> float:
        """Of the quantized product with channels divided by s, Euclidean."""
        factors = s.astype(np.float32)
        scaled, low, high, size = rows / factors, span.low / s, span.high / s, np.ones((1, 1), np.float32)
        if per_row:
            size = np.maximum(np.abs(scaled).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
            scaled = scaled / size
            low, high = scaled.min(axis=0), scaled.max(axis=0)
        stored, columns = weight_codes(weight * factors[:, None], 1, 0, bits)
        product = _rounded(scaled, ChannelRange(low, high)) @ (stored * columns) * size
        return float(np.linalg.norm(product - exact))

    plain = error(np.ones(len(weight)))
    least, factors = min(((error(s), s) for s in _candidates(span, weight)), key=lambda entry: entry[0])
    return factors if least <= _WORTH * plain else None


def _rounded(x: Array, span: ChannelRange) -> Array:
    """What uint8 codes of `x` mean."""
    scale, zero = activation_codes(span)
    result: Array = (np.clip(np.rint(x / scale) + np.float32(zero), 0, 255) - np.float32(zero)) * scale
    return result


def _candidates(span: ChannelRange, weight: Array) -> Iterator[Array]:
    peaks = span.peak.astype(np.float64)
    for alpha in _ALPHAS:
        yield migration_scales(peaks, np.abs(weight).max(axis=1).astype(np.float64), alpha)
    middle = float(np.median(peaks))
    for cap in _CAPS if middle > 0 else ():
        yield np.maximum(1.0, peaks / (cap * middle))

"""int8 weights whose rounding errors cancel on calibration rows (`passes.integer.weight_codes.compensated_codes`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, constant, constant_tensor, is_op
from xform.passes.integer.quantize_products import outliers, without_rows
from xform.passes.integer.weight_codes import (
    AsymmetricCodes,
    compensated_asymmetric_codes,
    compensated_codes,
    dot_product_instructions,
)
from xform.passes.normalize.ranges import Ranges
from xform.pipeline.calibration import observe
from xform.pipeline.oracle import Inputs

_WIDEST = 4096  # input channels; time and memory grow with their square and cube


def compensated_weights(
    model: ir.Model, batches: Sequence[Inputs], bits: int = 0, ranges: Ranges | None = None
) -> dict[str, tuple[Array, Array]]:
    """int8 codes [K, N] and float32 scales [N] by name of the weight, for products that `quantize_products` may take.

    A weight with several readers is rounded for all their rows together. About 2 s a product of 1536 x 384 on one core.

    Args:
        model: The graph before quantization.
        batches: Inputs by name.
        bits: Of the weights: 8, 7, or 0 for 8 without saturation on this machine.
        ranges: As `quantize_products` has them: rows of outlier channels, which stay in float, become zero.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    bits = bits or (8 if dot_product_instructions() else 0)
    codes = {}
    for weight, values, gram in _grams(model, batches):
        array = constant(weight)
        assert array is not None
        spans = [span for value in values if (span := (ranges or {}).get(value.name or "")) is not None]
        for apart in map(outliers, spans):
            gram[apart], gram[:, apart], array = 0, 0, without_rows(array, apart)
        codes[weight.name or ""] = compensated_codes(array, gram, bits)
    return codes


def compensated_grouped_weights(model: ir.Model, batches: Sequence[Inputs], group: int) -> dict[str, AsymmetricCodes]:
    """uint8 codes [K, N], scales and zero points [K / group, N] by name of the weight, for grouped products.

    See `compensated_weights` and `xform.passes.integer.grouped_products`.

    Args:
        group: Rows that share a scale; weights whose rows it does not divide are left out.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    found = _grams(model, batches)
    weights = ((weight.name or "", constant(weight), gram) for weight, _, gram in found)
    return {
        name: compensated_asymmetric_codes(array, gram, group)
        for name, array, gram in weights
        if array is not None and len(array) % group == 0
    }


def _grams(model: ir.Model, batches: Sequence[Inputs]) -> Iterator[tuple[ir.Value, list[ir.Value], Array]]:
    """Finite weights of products, what they multiply, and X^T X / M [K, K] over all rows of that."""
    read = {weight: values for weight in model.graph.initializers.values() if (values := _activations(weight))}
    values = list(dict.fromkeys(value for found in read.values() for value in found))
    grams: dict[ir.Value, Array] = {}
    rows: dict[ir.Value, int] = dict.fromkeys(values, 0)
    for arrays in observe(model, batches, values):
        for value, array in zip(values, arrays, strict=True):
            if not np.size(array):
                continue
            x = np.reshape(array, (-1, np.shape(array)[-1])).astype(np.float64)
            grams[value] = grams[value] + x.T @ x if value in grams else x.T @ x
            rows[value] += len(x)
    for weight, found in read.items():
        array, count = constant(weight), sum(rows[value] for value in found)
        if array is not None and count and np.isfinite(array).all():
            yield weight, found, np.sum([grams[value] for value in found if value in grams], axis=0) / count


def _activations(weight: ir.Value) -> list[ir.Value]:
    """What is multiplied by `weight` from the left; nothing where it is read otherwise, or too wide."""
    tensor = constant_tensor(weight)
    if tensor is None or len(tensor.shape) != 2 or weight.dtype is not ir.DataType.FLOAT:
        return []
    if int(tensor.shape.numpy()[0]) > _WIDEST:
        return []
    found = []
    for node, index in weight.uses():
        x = node.inputs[0] if is_op(node, "MatMul") and index == 1 else None
        if x is None or x.is_graph_input() or node.graph is not weight.graph:
            return []
        found.append(x)
    return found

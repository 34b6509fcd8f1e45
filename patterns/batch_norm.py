"""BatchNormalization in inference: a fixed affine map per channel.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias = a * x + c
    a = scale / sqrt(var + epsilon),  c = bias - a * mean

Source: Ioffe and Szegedy, "Batch Normalization", 2015. The channel is axis 1 of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, constant, is_op

CHANNEL_AXIS = 1


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNormalization whose statistics are known.

    Attributes:
        node: The operator.
        a: Factor per channel, float64.
        c: Shift per channel, float64.
    """

    node: ir.Node
    a: Array
    c: Array


def read(node: ir.Node) -> BatchNorm | str:
    """The affine map that `node` is, or why it is none."""
    if not is_op(node, "BatchNormalization"):
        return f"{node.op_type} is no BatchNormalization"
    if attribute(node, "training_mode", 0) or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return "it runs in training mode, with the statistics of the batch"
    names = ("scale", "bias", "mean", "variance")
    arrays: list[Array] = []
    for name, value in zip(names, node.inputs[1:5], strict=True):
        array = constant(value)
        if array is None:
            return f"its {name} is not constant"
        arrays.append(array.astype(np.float64))
    if any(a.ndim != 1 or a.shape != arrays[0].shape for a in arrays):
        return "its parameters are no vectors of one length"
    scale, bias, mean, variance = arrays
    spread = variance + float(attribute(node, "epsilon", 1e-5))
    if not np.all(spread > 0):
        return "its variance plus epsilon is not positive"
    a = scale / np.sqrt(spread)
    return BatchNorm(node, a, bias - a * mean)

"""Residual sums before a LayerNormalization, kept apart from it.

ONNX Runtime fuses `Add` and `LayerNormalization` to SkipLayerNormalization, whose CPU kernel takes three to four times
as long as the two (docs/onnxruntime-notes.md). It looks for `Add`; `Sum` of two inputs is the same and as fast.
"""

from __future__ import annotations

import onnx_ir as ir

from xform.backends.onnxruntime.emit import Emitter
from xform.graph.values import is_op, shape_of, used_once


def lower_residual(emitter: Emitter, node: ir.Node) -> bool:
    """`LayerNormalization(Add(x, skip))` to `LayerNormalization(Sum(x, skip))`; `node` is the Add."""
    output = node.outputs[0]
    if not used_once(output):
        return False
    use = next(iter(output.uses()))
    if use.idx != 0 or not is_op(use.node, "LayerNormalization"):
        return False
    if any(len(shape_of(x) or ()) == 1 for x in node.inputs):  # a bias, which the fusion does not take for a residual
        return False
    site = emitter.at(node)
    site.replace([(output, site.op("Sum", *node.inputs))], "residual: Sum")
    return True

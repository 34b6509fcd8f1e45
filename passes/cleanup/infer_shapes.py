"""Types and shapes of every value, derived anew (see `xform.graph.shapes`)."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.shapes import infer_shapes
from xform.graph.values import Dim, shape_of
from xform.rewrite.passes import Pass, PassContext


@dataclass(frozen=True)
class InferShapes(Pass):
    """Shape inference as a pass. It never changes what the graph computes, so it does not count as an application."""

    name = "infer_shapes"

    def run(self, model: ir.Model, context: PassContext) -> bool:
        before = _shapes(model)
        infer_shapes(model)
        return _shapes(model) != before


def _shapes(model: ir.Model) -> list[tuple[ir.DataType | None, tuple[Dim, ...] | None]]:
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return [(value.dtype, shape_of(value)) for node in nodes for value in node.outputs]

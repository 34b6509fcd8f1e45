"""Constants that a model computes from next to nothing: a kilobyte that doubles itself forty times.

What is folded, verified or run later has to be bounded where it is still only a shape.
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from xform import limits
from xform.graph.values import display_name, is_constant, shape_of


def check_computed(model: ir.Model) -> None:
    """Refuse a value that depends on constants only and is larger than the model is allowed.

    Args:
        model: After shape inference.

    Raises:
        LimitError: `memory`, with the node that computes the value.
    """
    stored = stored_bytes(model)
    computed: set[ir.Value] = set()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            continue
        if not all(value is None or value in computed or is_constant(value) for value in node.inputs):
            continue
        computed.update(node.outputs)
        for value in node.outputs:
            size = bytes_of(value)
            if size is not None:
                what = f"'{value.name}', computed from constants alone,"
                where = f"{display_name(node)} ({node.op_type})"
                limits.check("memory", size, what, where=where, brought=stored)


def bytes_of(value: ir.Value) -> int | None:
    """Bytes of a value whose shape is all numbers; None for another."""
    shape = shape_of(value)
    if shape is None or value.dtype is None or value.dtype is ir.DataType.STRING:
        return None
    numbers = [dim for dim in shape if isinstance(dim, int)]
    return prod(numbers) * value.dtype.bitwidth // 8 if len(numbers) == len(shape) else None


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )

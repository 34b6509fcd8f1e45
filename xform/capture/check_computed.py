"""Constants that a model computes from next to nothing: a kilobyte that doubles itself forty times.

What is folded, verified or run later has to be bounded where it is still only a shape.
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from xform import limits
from xform.errors import ModelError
from xform.graph.values import display_name, is_constant, is_op, scalar, shape_of


def check_computed(model: ir.Model) -> None:
    """Refuse values that depend on constants only and are larger than the model is allowed, one or all that last.

    A runtime computes such values when it loads the model, and keeps those that anything else reads.

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
    lasting = [value for value in computed if value.is_graph_output() or _read_by_others(value, computed)]
    total = sum(bytes_of(value) or 0 for value in lasting)
    limits.check("memory", total, f"{len(lasting)} values computed from constants alone, together,", brought=stored)


def check_ranges(model: ir.Model) -> None:
    """Refuse a Range of constants that is too long, before inference: ONNX's own counts its elements one by one.

    Raises:
        LimitError: `memory`, with the node.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not is_op(node, "Range") or len(node.inputs) != 3:
            continue
        start, limit, delta = (scalar(value) for value in node.inputs)
        if start is None or limit is None or not delta:
            continue
        length = (limit - start) / delta
        where = f"{display_name(node)} ({node.op_type})"
        if length != length:
            raise ModelError("a Range has bounds that are not numbers", where=where)
        limits.check("memory", 8 * length, "a Range of constants", where=where, brought=stored_bytes(model))


def _read_by_others(value: ir.Value, computed: set[ir.Value]) -> bool:
    return any(output not in computed for use in value.uses() for output in use.node.outputs)


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

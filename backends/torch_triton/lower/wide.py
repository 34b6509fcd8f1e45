"""What stays in float32 when a model is computed in half precision.

Positions, angles of rotary embeddings, and masks are computed from integers: a position of 257 has no bfloat16, and its
angle would be that of another token. So floats that only integers, booleans and small constants have gone into are
computed
as the model says, and rounded where they meet the model's activations.
"""

from __future__ import annotations

import onnx_ir as ir

from xform.graph.values import constant_tensor, is_constant, is_op

_MAX_CONSTANT = 1 << 16  # elements; above it, it is a weight
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_TABLES = ("Gather", "GatherElements", "GatherND")


def wide_nodes(graph: ir.Graph) -> tuple[set[ir.Node], set[ir.Value]]:
    """Nodes of a graph that compute from integers and small constants alone, and their float32 results."""
    nodes: set[ir.Node] = set()
    wide: set[ir.Value] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            continue
        if is_op(node, *_TABLES) and is_constant(inputs[0]):
            continue  # an embedding
        derived = any(not is_constant(value) for value in inputs)
        if derived and all(_is_exact(value, wide) for value in inputs):
            nodes.add(node)
            wide.update(output for output in node.outputs if output.dtype in _FLOATS)
    return nodes, wide


def _is_exact(value: ir.Value, wide: set[ir.Value]) -> bool:
    """Whether a value is exact, or computed in float32."""
    if value in wide:
        return True
    tensor = constant_tensor(value)
    if tensor is not None:
        return tensor.size <= _MAX_CONSTANT
    return value.dtype is not None and not value.dtype.is_floating_point()

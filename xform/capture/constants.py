"""Constant nodes become initializers, in the main graph and in subgraphs; tensors are taken over, not copied."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xform.graph.values import is_op


def lift_constants(model: ir.Model) -> int:
    """Replace Constant nodes by initializers of the same value name; returns how many.

    A Constant whose value is itself a graph output stays: an initializer as output is refused by some runtimes.
    """
    count = 0
    for graph in list(model.graphs()):
        for node in list(graph):
            if is_op(node, "Constant") and not node.outputs[0].is_graph_output():
                count += _lift(graph, node)
    return count


def _lift(graph: ir.Graph, node: ir.Node) -> bool:
    old = node.outputs[0]
    if not old.uses():
        graph.remove(node, safe=True)
        return True
    tensor = constant_value(node)
    if tensor is None or not old.name:
        return False
    value = ir.Value(
        name=old.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
        metadata_props=dict(old.metadata_props),
    )
    value.meta.update(old.meta)
    old.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    graph.register_initializer(value)
    return True


def constant_value(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node in any of its spellings; None for a reference attribute of a function."""
    if len(node.attributes) != 1:
        return None
    attr = next(iter(node.attributes.values()))
    name = node.outputs[0].name
    if attr.is_ref():
        return None
    match attr.name:
        case "value":
            return attr.as_tensor()
        case "value_int" | "value_ints":
            return ir.Tensor(np.array(attr.value, dtype=np.int64), name=name)
        case "value_float" | "value_floats":
            return ir.Tensor(np.array(attr.value, dtype=np.float32), name=name)
        case "value_string":
            return ir.StringTensor([_encoded(attr.value)], shape=ir.Shape([]), name=name)
        case "value_strings":
            texts = [_encoded(text) for text in attr.value]
            return ir.StringTensor(texts, shape=ir.Shape([len(texts)]), name=name)
    return None


def _encoded(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()

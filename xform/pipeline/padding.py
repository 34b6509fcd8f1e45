"""`padding="packed"`: what it means, so that verification can hold the result to it.

The outputs [batch, tokens, ...] of the model with zeros in the rows of pads. That is a choice of meaning and no
rewrite, so it is made once, on the captured graph, before anything is optimized and compared.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xform.errors import UsageError
from xform.graph.clone import clone
from xform.graph.shapes import infer_node
from xform.graph.values import shape_of
from xform.passes.attention.padding import find_padding


def zero_pads(captured: ir.Model, canonical: ir.Model) -> ir.Model:
    """A copy of `captured` whose outputs [B, S, ..] are zero where the mask says that there is no token.

    Args:
        captured: The graph as it came.
        canonical: The same with attention raised, in which the mask is found.

    Raises:
        UsageError: No key-padding mask that all attentions share.
    """
    padding = find_padding(canonical)
    if isinstance(padding, str):
        raise UsageError(f"padding='packed' is not possible: {padding}", hint="leave it out, or give the model a mask")
    model = clone(captured)
    graph = model.graph
    mask = next(value for value in graph.inputs if value.name == padding.mask.name)
    names = {value.name for value in graph.inputs} | {o.name for node in graph.all_nodes() for o in node.outputs}
    names |= set(graph.initializers)

    def add(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        count = 0
        while f"{op_type}_of_pads_{count}" in names:
            count += 1
        node.name = node.outputs[0].name = f"{op_type}_of_pads_{count}"
        names.add(node.name)
        graph.append(node)
        infer_node(node, graph.opset_imports[""])
        return node.outputs[0]

    def const(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], name: str) -> ir.Value:
        count = 0
        while f"{name}_{count}" in names:
            count += 1
        names.add(f"{name}_{count}")
        tensor = ir.tensor(array, name=f"{name}_{count}")
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    valid = mask if mask.dtype is ir.DataType.BOOL else add("Cast", mask, to=int(ir.DataType.BOOL))
    for index, output in enumerate(list(graph.outputs)):
        shape = shape_of(output)
        if shape is None or len(shape) < 3 or shape[:2] != padding.dims or output.dtype is None:
            continue
        axes = const(np.arange(2, len(shape), dtype=np.int64), "axes_of_pads")
        zero = const(np.zeros((), output.dtype.numpy()), "zero_of_pads")
        name, type_ = output.name, output.type
        result = add("Where", add("Unsqueeze", valid, axes), output, zero)
        output.name = f"{name}_with_pads"
        result.name, result.type, result.shape = name, type_, ir.Shape(shape)
        graph.outputs[index] = result
    return model

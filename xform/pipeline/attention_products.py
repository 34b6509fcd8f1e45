"""Products that a fused attention takes in: its projections, where one input makes queries, keys and values.

Runtimes run such a block in one operator where all of its projections are in float (`com.microsoft.Attention`) or all
in int8 (`com.microsoft.QAttention`). Otherwise they are products of their own, with sums of biases and transposes
beside them.
"""

from __future__ import annotations

import onnx_ir as ir

from xform.graph.values import constant_tensor, display_name, is_constant, is_op

_LAYOUT = ("Transpose", "Reshape", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Identity")


def attention_products(model: ir.Model) -> list[tuple[str, ...]]:
    """Original names of the projections of each Attention, of those that one input makes by products alone.

    Args:
        model: A canonical graph.
    """
    found = []
    for node in model.graph.all_nodes():
        if not is_op(node, "Attention"):
            continue
        products = [_product(value) for value in node.inputs[:3]]
        if any(product is None for product in products):
            continue
        different = list(dict.fromkeys(product for product in products if product is not None))
        if len({product.inputs[0] for product in different}) == 1:
            found.append(tuple(display_name(product) for product in different))
    return found


def _product(value: ir.Value | None) -> ir.Node | None:
    """The product with a constant matrix that `value` comes from, over layout and one bias."""
    node = value.producer() if value is not None else None
    while node is not None and is_op(node, *_LAYOUT):
        node = _producer(node.inputs[0])
    if node is not None and is_op(node, "Add"):
        inner = [value for value in node.inputs if not is_constant(value)]
        node = _producer(inner[0]) if len(inner) == 1 else None
    weight = constant_tensor(node.inputs[1]) if node is not None and is_op(node, "MatMul") else None
    return node if weight is not None and len(weight.shape) == 2 else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None

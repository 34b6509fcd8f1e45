"""Bottleneck adapters with a nonlinearity: x + up(act(down(x))), or y(x) + up(act(down(x))).

They look like linear adapters, and unlike them cannot be merged into a weight. The hidden layer is narrower than the
model, which tells them from feed-forward blocks. Sources: Houlsby et al., "Parameter-Efficient Transfer Learning for
NLP", 2019; AdapterTune, 2026.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.values import constant, is_constant, is_op, shape_of

ACTIVATIONS = (
    *("Relu", "Gelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu", "Selu", "Mish", "Softplus"),
    *("LeakyRelu", "PRelu", "Clip", "Swish"),
)
_MAX_STEPS = 8


@dataclass(frozen=True)
class NonlinearAdapter:
    """An adapter with something between its two products.

    Attributes:
        up, down: The products.
        activation: What stands between them.
        hidden, width: Numbers of channels between them and after them.
    """

    up: ir.Node
    down: ir.Node
    activation: ir.Node
    hidden: int
    width: int


def read(add: ir.Node) -> NonlinearAdapter | None:
    """The adapter whose branch ends in `add`, or None."""
    if not is_op(add, "Add") or len(add.inputs) != 2:
        return None
    for branch, other in (add.inputs, tuple(reversed(add.inputs))):
        found = _branch(branch, other)
        if found is not None:
            return found
    return None


def _branch(branch: ir.Value | None, other: ir.Value | None) -> NonlinearAdapter | None:
    up = _product(branch)
    if up is None or other is None:
        return None
    activation = up.inputs[0].producer() if up.inputs[0] is not None else None
    if activation is None:
        return None
    inner = activation.inputs[0]
    if is_op(activation, "Mul"):  # SiLU: x * Sigmoid(x)
        gate = activation.inputs[1].producer() if activation.inputs[1] is not None else None
        if gate is None or not is_op(gate, "Sigmoid") or gate.inputs[0] is not inner:
            return None
    elif not is_op(activation, *ACTIVATIONS):
        return None
    down = _product(inner)
    if down is None:
        return None
    sizes = shape_of(up.inputs[1]), shape_of(down.inputs[1])
    if any(s is None or len(s) != 2 or not all(isinstance(d, int) for d in s) for s in sizes):
        return None
    (hidden, width), (source, _) = ([int(d) for d in s if isinstance(d, int)] for s in sizes if s is not None)
    if hidden >= min(width, source) or not _reads(other, down.inputs[0]):
        return None
    return NonlinearAdapter(up, down, activation, hidden, width)


def _product(value: ir.Value | None) -> ir.Node | None:
    """The MatMul with a constant matrix behind biases and factors."""
    for _ in range(_MAX_STEPS):
        node = value.producer() if value is not None else None
        if node is None:
            return None
        if is_op(node, "MatMul"):
            return node if is_constant(node.inputs[1]) else None
        if not is_op(node, "Add", "Mul") or len(node.inputs) != 2:
            return None
        free = [v for v in node.inputs if constant(v, max_elements=1 << 20) is None]
        if len(free) != 1:
            return None
        value = free[0]
    return None


def _reads(value: ir.Value, source: ir.Value | None) -> bool:
    """Whether `value` is `source` or a product of it, biases and factors apart."""
    if value is source:
        return True
    product = _product(value)
    return product is not None and product.inputs[0] is source

"""A normalization over channels with its affine map: LayerNormalization, or RMSNormalization and an Add."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.norms import IDENTITY_AFFINE, NORMS, normalized_axis
from xform.graph.values import Array, attribute, constant, is_op, used_once
from xform.rewrite.builder import Builder


@dataclass(frozen=True)
class Norm:
    """y = normalized(x) * scale + bias, over the last axis.

    Attributes:
        node: The operator.
        add: The Add of the bias, where it stands apart.
        scale: float64 [C].
        bias: float64 [C]; zeros where there is none.
        output: y.
    """

    node: ir.Node
    add: ir.Node | None
    scale: Array
    bias: Array
    output: ir.Value

    @property
    def channels(self) -> int:
        """C."""
        return int(self.scale.shape[0])

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The operator, and the Add if there is one."""
        return (self.node,) if self.add is None else (self.node, self.add)

    def is_identity(self) -> bool:
        """Whether the affine map changes nothing."""
        return bool(np.all(self.scale == 1) and not np.any(self.bias))

    def build(self, build: Builder, scale: Array, bias: Array) -> ir.Value:
        """The normalization with another affine map, rounded once to the type of the old one.

        A bias of zeros is left out; an identity map is marked (`IDENTITY_AFFINE`).
        """
        node = self.node
        tensor = node.inputs[1]
        assert tensor is not None and tensor.dtype is not None
        numpy_type, base = tensor.dtype.numpy(), tensor.name or "scale"
        w = build.constant(ir.tensor(scale.astype(numpy_type), dtype=tensor.dtype), base)
        b = (
            build.constant(ir.tensor(bias.astype(numpy_type), dtype=tensor.dtype), f"{base}_bias")
            if bias.any()
            else None
        )
        fused = b if is_op(node, "LayerNormalization") else None
        attributes = {name: attribute(node, name) for name in ("axis", "epsilon", "stash_type")}
        value = build.op(node.op_type, node.inputs[0], w, fused, **attributes)
        producer = value.producer()
        if producer is not None and b is None and np.all(scale == 1):
            producer.metadata_props[IDENTITY_AFFINE] = "1"
        return value if b is None or fused is not None else build.op("Add", value, b)


def read(node: ir.Node) -> Norm | str:
    """A LayerNormalization or RMSNormalization over the last axis, or why it is none that can be changed."""
    if not is_op(node, *NORMS):
        return f"{node.op_type} is no normalization over channels"
    if normalized_axis(node) is None:
        return "it does not run over exactly the last axis, or its statistics are read"
    scale, given = constant(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant(given)
    if scale is None or scale.ndim != 1 or (given is not None and bias is None):
        return "its scale or bias is not a constant vector"
    wide = scale.astype(np.float64)
    shift = np.zeros(wide.shape) if bias is None else np.broadcast_to(bias.astype(np.float64), wide.shape)
    output = node.outputs[0]
    add = _added(node, len(wide)) if given is None else None
    if add is None:
        return Norm(node, None, wide, shift, output)
    return Norm(node, add[0], wide, add[1], add[0].outputs[0])


def _added(norm: ir.Node, channels: int) -> tuple[ir.Node, Array] | None:
    """The Add of one constant per channel that alone reads `norm`, and the constant."""
    if not used_once(norm.outputs[0]):
        return None
    use = next(iter(norm.outputs[0].uses()))
    if not is_op(use.node, "Add") or use.node.graph is not norm.graph:
        return None
    array = constant(use.node.inputs[1 - use.idx], max_elements=channels)
    if array is None or array.shape != (channels,):
        return None
    return use.node, array.astype(np.float64)

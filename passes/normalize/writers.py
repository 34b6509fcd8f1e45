"""Writers of a residual stream with another set of output channels: recentred, or with one channel fewer.

A linear map f over channels, applied to everything that is written, moves into the writers: f(W x + b) = (f W) x + f b,
with f along the output channels, and f(constant) is a constant. The products are taken in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.channel_axis import VIEWS, operands
from xform.graph.rounding import folding_loss, narrowed
from xform.graph.streams import Writer
from xform.graph.values import Array, attribute, constant, display_name, is_op
from xform.passes.reparameterize import linear_map
from xform.passes.reparameterize.channel_path import Affine, affine_of, rebuild
from xform.passes.reparameterize.linear_map import LinearMap
from xform.rewrite.builder import Builder

Map = Callable[[Array, int], Array]  # a linear map over the channels, which are the given axis


def recentred(array: Array, axis: int) -> Array:
    """P x with P = I - 1 1^T / d: the mean over `axis` removed."""
    centred: Array = array - array.mean(axis=axis, keepdims=True)
    return centred


@dataclass(frozen=True)
class LinearWriter:
    """A linear map, arithmetic per channel, and the views between and after them.

    Attributes:
        linear: The map.
        affine: What the arithmetic amounts to.
        views: Transposes and reshapes, from the map on.
    """

    linear: LinearMap
    affine: Affine
    views: tuple[ir.Node, ...]

    def mapped(self, function: Map) -> tuple[Array, Array | None]:
        """Weight and bias of function(a * (W x + b) + c), in float64."""
        weight, bias = self.linear.weight, self.linear.bias
        if np.any(self.affine.a != 1) or np.any(self.affine.c):
            weight, bias = self.linear.scale_output(self.affine.a, self.affine.c)
        if bias is not None and (not bias.ndim or bias.shape[-1] == 1):
            bias = np.broadcast_to(bias, (*bias.shape[:-1], self.linear.output_channels()))
        return function(weight, _output_axis(self.linear.node)), None if bias is None else function(bias, -1)

    def build(self, build: Builder, function: Map) -> ir.Value:
        """The writer with `function` applied to its output channels."""
        operand = self.linear.node.inputs[0]
        assert operand is not None
        value = self.linear.build(build, operand, *self.mapped(function))
        for view in self.views:
            value = rebuild(build, view, value)
        return value


def _output_axis(node: ir.Node) -> int:
    """Where the output channels are in the weight of a linear map with one group."""
    if is_op(node, "Conv"):
        return 0
    return 0 if is_op(node, "Gemm") and attribute(node, "transB", 0) else 1


def read_writer(writer: Writer, channels: int) -> LinearWriter | str:
    """A writer of kind "linear" with its weights loaded, or why it is none after all."""
    axis, affines, views = writer.axis, [], []
    for node in writer.nodes[:-1]:
        if is_op(node, "Transpose", *VIEWS):
            inner = operands(node, axis)
            if isinstance(inner, str):
                return inner
            views.append(node)
            axis = inner[0]
            continue
        found = next((f for v in node.inputs if v is not None and (f := affine_of(node, v, axis, channels))), None)
        if found is None:
            return f"{node.op_type} ({display_name(node)}) is no arithmetic with one number per channel"
        affines.append(found)
    linear = linear_map.read(writer.nodes[-1])
    if isinstance(linear, str):
        return linear
    if linear.output_channels() != channels:
        return f"{linear.node.op_type} has {linear.output_channels()} output channels, the stream {channels}"
    affine = Affine(np.ones(channels), np.zeros(channels))
    for step in reversed(affines):
        affine = step.after(affine)
    return LinearWriter(linear, affine, tuple(reversed(views)))


def mapped_constant(writer: Writer, function: Map) -> ir.TensorProtocol:
    """A constant that is written, with `function` applied to its channels."""
    array, value = constant(writer.value), writer.value
    assert array is not None and value.dtype is not None
    return narrowed(function(array.astype(np.float64), writer.axis), value.dtype)


def unwritable(writer: Writer, channels: int, function: Map) -> str | None:
    """Why `function` cannot be moved into a linear or constant writer; None if it can."""
    if writer.kind == "constant":
        return None
    found = read_writer(writer, channels)
    if isinstance(found, str):
        return f"{writer.name} writes to it: {found}"
    weight, bias = found.mapped(function)
    dtype = found.linear.dtype
    loss = folding_loss(weight, bias, dtype)
    return None if loss is None else f"the new weight of {writer.name} {loss}"

"""Conv, ConvTranspose, Gemm and MatMul as one thing: a linear map over channels with a constant weight.

With y = L(x; W, b) and per-channel vectors a, c (float64), both directions keep the map linear:

    a * y + c              = L(x; W', b')   with  W' = W scaled by a over output channels,  b' = a * b + c
    L(a * x + c; W, b)     = L(x; W', b')   with  W' = W scaled by a over input channels,   b' = b + L(c; W, 0)

The first holds always: padding, cropping and output padding concern x, not y. The second holds where L(c; W, 0) is the
same at every position: not where a convolution pads with zeros (the shift would reach only part of the kernel there),
and for ConvTranspose only for a kernel of 1 with stride 1 and no cropping (elsewhere positions see different taps).
With c = 0 it holds always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, attributes_of, constant, constant_tensor, display_name, is_op, rank_of
from xform.rewrite.builder import Builder

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class LinearMap:
    """One of `OPERATORS` with constant weight and bias.

    Attributes:
        node: The operator.
        weight: Its weight as it stands, in float64.
        bias: Its bias in float64 (for Gemm times beta), or None; the last axis (the only one, but for Gemm) is the
            output channel.
        dtype: Type of the weight.
    """

    node: ir.Node
    weight: Array
    bias: Array | None
    dtype: ir.DataType

    @property
    def group(self) -> int:
        """Number of groups of a convolution."""
        return int(attribute(self.node, "group", 1))

    def input_axis(self) -> int | None:
        """The channel axis of the operand."""
        return _channel_axis(self.node, self.node.inputs[0])

    def output_axis(self) -> int | None:
        """The channel axis of the result."""
        return _channel_axis(self.node, self.node.outputs[0])

    def output_channels(self) -> int:
        """Number of output channels."""
        if self.node.op_type == "Conv":
            return int(self.weight.shape[0])
        if self.node.op_type == "ConvTranspose":
            return int(self.weight.shape[1]) * self.group
        return int(self.weight.shape[0 if self._transposed() else 1])

    def input_channels(self) -> int:
        """Number of input channels."""
        if self.node.op_type == "Conv":
            return int(self.weight.shape[1]) * self.group
        if self.node.op_type == "ConvTranspose":
            return int(self.weight.shape[0])
        return int(self.weight.shape[1 if self._transposed() else 0])

    def scale_output(self, a: Array, c: Array) -> tuple[Array, Array]:
        """Weight and bias of a * L(x) + c."""
        bias = c if self.bias is None else a * self.bias + c
        return self._scaled(a, output=True), bias

    def scale_input(self, a: Array, c: Array) -> tuple[Array, Array | None]:
        """Weight and bias of L(a * x + c); the bias stays None where there is none and c = 0."""
        weight = self._scaled(a, output=False)
        if not np.any(c):
            return weight, self.bias
        shift = self._scaled(c, output=False)
        match self.node.op_type:
            case "Conv":
                shift = shift.sum(axis=tuple(range(1, shift.ndim)))
            case "ConvTranspose":  # a kernel of 1: [C, M/g, 1...] -> per group the sum over its C/g inputs
                shift = shift.reshape(self.group, -1, shift.shape[1]).sum(axis=1).reshape(-1)
            case _:
                shift = shift.sum(axis=1 if self._transposed() else 0)
        if self.node.op_type == "Gemm":
            shift = shift * float(attribute(self.node, "alpha", 1.0))
        return weight, shift if self.bias is None else self.bias + shift

    def shift_is_uniform(self) -> str | None:
        """None if a constant operand gives the same result at every position; else why not."""
        if self.node.op_type not in ("Conv", "ConvTranspose"):
            return None
        kernel = self.weight.shape[2:]
        pads, auto_pad = attribute(self.node, "pads", None) or [0], str(attribute(self.node, "auto_pad", "NOTSET"))
        strides = attribute(self.node, "strides", None) or [1]
        if self.node.op_type == "ConvTranspose":
            extra = (attribute(self.node, "output_padding", None) or [0], attribute(self.node, "output_shape", None))
            if any(k != 1 for k in kernel) or any(s != 1 for s in strides) or any(pads) or any(extra[0]) or extra[1]:
                return "the transposed convolution spreads a shift unevenly over its output"
            return None
        padded = any(pads) if auto_pad in ("NOTSET", "") else auto_pad != "VALID" and any(k != 1 for k in kernel)
        return "the convolution pads its input with zeros, which the shift does not reach" if padded else None

    def build(self, build: Builder, x: ir.Value, weight: Array, bias: Array | None) -> ir.Value:
        """The map with another weight and bias, cast once from float64 to the type that they had."""
        attributes: dict[str, Any] = attributes_of(self.node)
        source = self.node.inputs[1]
        name = source.name if source is not None and source.name else "weight"
        w = build.folded(weight, self.dtype, name)
        b = None if bias is None else build.folded(bias, self.dtype, f"{name}_bias", summand=True)
        if self.node.op_type == "MatMul":
            product = build.op("MatMul", x, w)
            return product if b is None else build.op("Add", product, b)
        if self.node.op_type == "Gemm":
            attributes.pop("beta", None)
        return build.op(self.node.op_type, x, w, b, **attributes)

    def _transposed(self) -> bool:
        return self.node.op_type == "Gemm" and bool(attribute(self.node, "transB", 0))

    def _scaled(self, factor: Array, *, output: bool) -> Array:
        w, g = self.weight, self.group
        if self.node.op_type in ("Gemm", "MatMul"):
            columns = output != self._transposed()
            return w * (factor[None, :] if columns else factor[:, None])
        # The axis that is split into groups is 0 for both; the other axis counts channels within a group.
        outer = output == (self.node.op_type == "Conv")
        if outer:
            return w * factor.reshape(-1, *[1] * (w.ndim - 1))
        grouped = w.reshape(g, -1, *w.shape[1:])
        return (grouped * factor.reshape(g, 1, -1, *[1] * (w.ndim - 2))).reshape(w.shape)


def read(node: ir.Node) -> LinearMap | str:
    """`node` as a linear map, or why it is none."""
    if not is_op(node, *OPERATORS):
        return f"{node.op_type} is not linear"
    kind = node.op_type
    weight = node.inputs[1]
    tensor = constant_tensor(weight)
    array = constant(weight)
    if tensor is None or array is None:
        return f"the weight of {kind} is not constant"
    if (kind in ("MatMul", "Gemm") and array.ndim != 2) or array.ndim < 2:
        return f"the constant operand of {kind} is no matrix"
    group = int(attribute(node, "group", 1))
    if group < 1 or array.shape[0] % group:
        return f"the weight of {kind} does not divide into {group} groups"
    if kind == "Gemm" and attribute(node, "transA", 0):
        return "Gemm transposes its operand"
    if tensor.dtype not in FLOATS:
        return f"the weight of {kind} is of type {tensor.dtype.name}"
    given = node.inputs[2] if len(node.inputs) > 2 and kind != "MatMul" else None
    bias = constant(given)
    if given is not None and bias is None:
        return f"the bias of {kind} is not constant"
    wide = None if bias is None else bias.astype(np.float64)
    if wide is not None and kind == "Gemm":
        wide = wide * float(attribute(node, "beta", 1.0))
    linear = LinearMap(node, array.astype(np.float64), wide, tensor.dtype)
    if wide is not None and wide.ndim and wide.shape[-1] not in (1, linear.output_channels()):
        return f"the bias of {kind} does not fit its weight"
    return linear


def _channel_axis(node: ir.Node, value: ir.Value | None) -> int | None:
    if node.op_type != "MatMul":
        return 1
    rank = rank_of(value)
    return None if rank is None else rank - 1


def shared_note(nodes: Sequence[ir.Node]) -> str:
    """For the remark: weights of `nodes` that others read too; those stay, and the merged map has copies of its own."""
    inside = set(nodes)
    names: dict[str, None] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None or value.producer() is not None or value.const_value is None:
                continue
            if value.dtype not in FLOATS or len(value.const_value.shape) < 2:  # vectors are small change
                continue
            readers = [use.node for use in value.uses() if use.node not in inside]
            if readers:
                names[f"{value.name} (read by {display_name(readers[0])} too)"] = None
    return f"has a copy of its own of {', '.join(names)}" if names else ""

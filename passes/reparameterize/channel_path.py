"""Following one channel axis through operators that treat channels apart: views, transposes, constants per channel.

Between a linear map and a BatchNormalization there often stand a Transpose (tokens as channels last), a Reshape that
merges other axes, or the Add of a bias. The channel stays one axis all along, so an affine map per channel moves
through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.channel_axis import VIEWS, axis_after
from xform.graph.values import Array, attribute, attributes_of, constant, is_op, rank_of, shape_of
from xform.passes.reparameterize.constant_expression import evaluate
from xform.rewrite.builder import Builder

COMMUTING = ("ReduceMean", "GlobalAveragePool", "AveragePool", "MaxPool", "Resize", "Slice", "Gather", "Pad")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True)
class Affine:
    """z -> a * z + c per channel, in float64."""

    a: Array
    c: Array

    def after(self, inner: Affine) -> Affine:
        """self(inner(z))."""
        return Affine(self.a * inner.a, self.a * inner.c + self.c)


def axis_through(node: ir.Node, value: ir.Value, axis: int, affine: Affine) -> int | None:
    """Where `axis` of `value` is after an operator that commutes with `affine`; None if it does not.

    A factor and a shift per channel commute with whatever averages or selects positions within a channel: means over
    other axes, pooling that divides by what it has summed, interpolation, slices, padding by reflection or repetition,
    and, where the factors are not negative, maxima.
    """
    if node.inputs[0] is not value or any(v is value for v in node.inputs[1:]):
        return None
    before, after = rank_of(value), rank_of(node.outputs[0])
    if before is None or after is None:
        return None
    if is_op(node, "Transpose", *VIEWS):
        return axis_after(node, axis)
    if is_op(node, "GlobalAveragePool"):
        return axis if axis == 1 else None
    if is_op(node, "AveragePool"):
        padded = any(attribute(node, "pads", None) or [0]) or str(attribute(node, "auto_pad", "NOTSET")) not in (
            "NOTSET",
            "VALID",
        )
        even = not attribute(node, "count_include_pad", 0) or not (padded or attribute(node, "ceil_mode", 0))
        return axis if axis == 1 and even else None
    if is_op(node, "MaxPool"):
        return axis if axis == 1 and bool(np.all(affine.a >= 0)) and len(node.outputs) == 1 else None
    if is_op(node, "Resize"):
        return axis if axis == 1 and _interpolates(node, before) else None
    if is_op(node, "Pad"):
        return axis if str(attribute(node, "mode", "constant")) in ("reflect", "edge", "wrap") else None
    return _axis_after_removal(node, axis, before, after)


def _interpolates(node: ir.Node, rank: int) -> bool:
    """Whether a Resize leaves batch and channels alone and gives every position weights that sum to one."""
    mode = str(attribute(node, "coordinate_transformation_mode", "half_pixel"))
    shapes = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if mode == "tf_crop_and_resize" or any(s is None or len(s) != rank for s in shapes):
        return False
    (a, b) = (s[:2] for s in shapes if s is not None)
    return a == b and None not in a


def _axis_after_removal(node: ir.Node, axis: int, before: int, after: int) -> int | None:
    """For ReduceMean, Slice and Gather over other axes."""
    if is_op(node, "Gather"):
        chosen = int(attribute(node, "axis", 0)) % before
        if chosen == axis or rank_of(node.inputs[1]) not in (0, 1):
            return None
        return axis - (1 if after < before and chosen < axis else 0)
    if is_op(node, "ReduceMean", "Slice"):
        place = 1 if is_op(node, "ReduceMean") else 3
        given = node.inputs[place] if len(node.inputs) > place else None
        axes = constant(given)
        if axes is None:
            return None
        over = {int(a) % before for a in axes}
        if axis in over:
            return None
        kept = is_op(node, "Slice") or bool(attribute(node, "keepdims", 1))
        return axis if kept else axis - sum(a < axis for a in over)
    return None


def affine_of(node: ir.Node, operand: ir.Value, axis: int, channels: int) -> Affine | None:
    """The affine map per channel that an Add, Sub, Mul or Div with a constant applies to `operand`, or None."""
    if not is_op(node, *_ARITHMETIC) or len(node.inputs) != 2:
        return None
    first = node.inputs[0] is operand
    other = node.inputs[1] if first else node.inputs[0]
    size, shape = shape_of(other), shape_of(operand)
    if size is None or math.prod(s if isinstance(s, int) else channels + 1 for s in size) > channels:
        return None
    array = evaluate(other)
    if other is operand or array is None or shape is None or array.ndim > len(shape) or array.dtype.kind in "biu":
        return None
    padded = array.reshape([1] * (len(shape) - array.ndim) + list(array.shape))
    if any(size != 1 for index, size in enumerate(padded.shape) if index != axis):
        return None
    vector = np.broadcast_to(padded.reshape(-1).astype(np.float64), (channels,))
    one, zero = np.ones(channels), np.zeros(channels)
    match node.op_type:
        case "Add":
            return Affine(one, vector)
        case "Sub":
            return Affine(one, -vector) if first else Affine(-one, vector)
        case "Mul":
            return Affine(vector, zero)
    return Affine(1 / vector, zero) if first and np.all(vector != 0) else None


def rebuild(build: Builder, node: ir.Node, x: ir.Value) -> ir.Value:
    """A Transpose or view again, over another operand of the same shape."""
    attributes = attributes_of(node)
    return build.op(node.op_type, x, *node.inputs[1:], **attributes)

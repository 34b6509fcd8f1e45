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

from xform.graph import dims
from xform.graph.dims import Expr
from xform.graph.values import Array, attribute, is_op, shape_of
from xform.passes.reparameterize.constant_expression import evaluate
from xform.rewrite.builder import Builder

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True)
class Affine:
    """z -> a * z + c per channel, in float64."""

    a: Array
    c: Array

    def after(self, inner: Affine) -> Affine:
        """self(inner(z))."""
        return Affine(self.a * inner.a, self.a * inner.c + self.c)


def axis_before(node: ir.Node, axis: int) -> int | None:
    """Where the axis `axis` of the output of a Transpose or view is in its operand; None if it does not survive."""
    return _moved(node, axis, node.outputs[0], node.inputs[0], outward=False)


def axis_after(node: ir.Node, axis: int) -> int | None:
    """Where the axis `axis` of the operand of a Transpose or view is in its output; None if it does not survive."""
    return _moved(node, axis, node.inputs[0], node.outputs[0], outward=True)


def _moved(node: ir.Node, axis: int, start: ir.Value | None, end: ir.Value | None, *, outward: bool) -> int | None:
    here, there = shape_of(start), shape_of(end)
    if here is None or there is None or not 0 <= axis < len(here):
        return None
    if is_op(node, "Transpose"):
        perm = attribute(node, "perm") or list(reversed(range(len(here))))
        return list(perm).index(axis) if outward else int(perm[axis])
    if not is_op(node, *VIEWS) or not isinstance(here[axis], int):
        return None
    inner = _product(here[axis + 1 :])
    for index, size in enumerate(there):
        if size == here[axis] and inner is not None and _product(there[index + 1 :]) == inner:
            return index
    return None


def _product(sizes: tuple[int | str | None, ...]) -> Expr | None:
    total: Expr = 1
    for size in sizes:
        if size is None:
            return None
        total = dims.mul(total, size if isinstance(size, int) else dims.parse(size))
    return total


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
    attributes = {name: attr.value for name, attr in node.attributes.items()}
    return build.op(node.op_type, x, *node.inputs[1:], **attributes)

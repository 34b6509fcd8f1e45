"""What an input is for, read from how the graph uses it, so that random values are ones the model can take.

An integer input that ends in Gather's `indices` must stay below the number of rows; one that is turned into a mask must
be 0 or 1. Structure decides; names are asked only where structure says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from xform.graph.values import ONNX_DOMAINS, attribute, is_constant, scalar, shape_of

Kind = Literal["plain", "mask", "additive_mask", "positive", "index", "size"]

# operators that hand the values of their first input on unchanged, whatever they do to the shape
_TRANSPARENT = {
    "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Expand", "Tile", "Transpose", "Slice", "Split",
    "Concat", "Gather", "Cast", "CastLike", "Pad", "Dropout",
}  # fmt: skip
_INDEXED = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "ScatterElements": 1, "ScatterND": 1}
_COMPARISONS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
_SIZE_INPUTS = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "TopK": (1,),
    "Resize": (3,), "Upsample": (1,), "Pad": (1,), "Slice": (1, 2), "Split": (1,),
}  # fmt: skip
_PRECEDENCE: tuple[Kind, ...] = ("mask", "additive_mask", "size", "positive", "index")
_STEPS_TO_SOFTMAX = 5  # operators between the sum with a mask and the softmax
_BEFORE_SOFTMAX = {"Add", "Reshape", "Cast", "Identity", "Clip", "Max", "Transpose", "Flatten", "Squeeze"}
_MAX_VISITS = 256  # values followed per input; uses that matter are near the input


@dataclass(frozen=True)
class Role:
    """Values that an input may take.

    Attributes:
        kind: "mask" (0 or 1), "additive_mask" (0 or very negative), "positive" (floats above 0), "index" (integers
            below `high`), "size" (a length or a shape), "plain" (anything).
        high: Exclusive upper bound of an index, None where unknown.
    """

    kind: Kind
    high: int | None = None


def role_of(value: ir.Value) -> Role:
    """The role of a graph input, from its uses, then from its name."""
    found = _roles_from_uses(value)
    bounds = [role.high for role in found if role.kind == "index" and role.high is not None]
    if bounds:
        return Role("index", min(bounds))
    for kind in _PRECEDENCE:
        if any(role.kind == kind for role in found):
            return Role(kind)
    return _role_from_name(value)


def _roles_from_uses(start: ir.Value) -> list[Role]:
    found: list[Role] = []
    queue: list[tuple[ir.Value, int]] = [(start, 0)]
    seen = {start}
    while queue and len(seen) < _MAX_VISITS:
        value, offset = queue.pop()
        for node, position in value.uses():
            if node.domain not in ONNX_DOMAINS:
                continue
            role = _role_in(node, position, value)
            added = _hands_on(node, position)
            if role is not None:
                found.append(_minus(role, offset))
            elif added is not None:
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                queue.extend((output, offset + added) for output in fresh)
    return found


def _hands_on(node: ir.Node, position: int) -> int | None:
    """The integer that a node adds to the values it hands on (0 for most); None if it makes something else of them."""
    op = node.op_type
    if op in _TRANSPARENT:
        return 0 if position == 0 or op == "Concat" else None
    if op == "Where":
        return 0 if position > 0 else None
    if op in ("Add", "Sub") and len(node.inputs) == 2:
        number = scalar(node.inputs[1 - position])
        if isinstance(number, int) and (op == "Add" or position == 0):
            return number if op == "Add" else -number
    return None


def _minus(role: Role, offset: int) -> Role:
    """The role of `v` where `v + offset` has this role."""
    return role if role.high is None else Role(role.kind, max(role.high - offset, 1))


def _role_in(node: ir.Node, position: int, value: ir.Value) -> Role | None:
    """What one use says; None if it says nothing."""
    op = node.op_type
    if _INDEXED.get(op) == position:
        return Role("index", _rows(node))
    if op == "OneHot" and position == 0:
        depth = scalar(node.inputs[1])
        return Role("index", int(depth)) if depth else None
    if position in _SIZE_INPUTS.get(op, ()):
        return Role("size")
    if op == "Cast" and attribute(node, "to") == ir.DataType.BOOL:
        return Role("mask")
    if op in ("Not", "And", "Or") or (op == "Where" and position == 0):
        return Role("mask")
    if op == "Sub" and position == 1 and scalar(node.inputs[0]) == 1:
        return Role("mask")
    if op in _COMPARISONS and value.dtype is not None and value.dtype.is_integer():
        return Role("mask") if scalar(node.inputs[1 - position]) in (0, 1) else None
    if op in ("Sqrt", "Log") or (op == "Pow" and position == 0 and _is_fraction(node.inputs[1])):
        return Role("positive")
    if op == "Add" and _feeds_softmax(node):
        return Role("additive_mask") if value.dtype is not None and value.dtype.is_floating_point() else None
    if op == "Attention" and position == 3:
        floating = value.dtype is not None and value.dtype.is_floating_point()
        return Role("additive_mask" if floating else "mask")
    return None


def _is_fraction(exponent: ir.Value | None) -> bool:
    number = scalar(exponent)
    return number is not None and not float(number).is_integer()


def _rows(node: ir.Node) -> int | None:
    """How many different indices an indexing node takes: the length of the data's indexed axis where it is known."""
    shape = shape_of(node.inputs[0])
    if not shape:
        return None
    axis = int(attribute(node, "axis", 0))
    if node.op_type.endswith("ND"):
        known = [dim for dim in shape if isinstance(dim, int)]
        return min(known) if len(known) == len(shape) else 1
    dim = shape[axis] if -len(shape) <= axis < len(shape) else None
    return dim if isinstance(dim, int) else (None if is_constant(node.inputs[0]) else 1)


def _feeds_softmax(node: ir.Node) -> bool:
    value = node.outputs[0]
    for _ in range(_STEPS_TO_SOFTMAX):
        users = [user for user, _ in value.uses() if user.domain in ONNX_DOMAINS]
        if any(user.op_type == "Softmax" for user in users):
            return True
        if len(users) != 1 or users[0].op_type not in _BEFORE_SOFTMAX:
            return False
        value = users[0].outputs[0]
    return False


def compared_with(start: ir.Value) -> tuple[float, ...]:
    """Numbers that the graph compares an input with: at them, and beside them, it decides otherwise."""
    found: dict[float, None] = {}
    queue, seen = [start], {start}
    while queue and len(seen) < _MAX_VISITS:
        for node, position in queue.pop().uses():
            if node.domain not in ONNX_DOMAINS:
                continue
            if node.op_type in _COMPARISONS:
                number = scalar(node.inputs[1 - position])
                found.update({float(number): None} if number is not None else {})
            elif _hands_on(node, position) == 0:
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                queue.extend(fresh)
    return tuple(number for number in found if number == number and abs(number) != float("inf"))


def _role_from_name(value: ir.Value) -> Role:
    name = (value.name or "").lower()
    if "mask" in name:
        return Role("mask")
    integer = value.dtype is not None and value.dtype.is_integer()
    if integer and ("token_type" in name or "segment" in name):
        return Role("index", 2)
    if integer and (name.endswith("ids") or "position" in name or "index" in name or "indices" in name):
        return Role("index", None)
    if integer and ("length" in name or "size" in name or "shape" in name):
        return Role("size")
    return Role("plain")

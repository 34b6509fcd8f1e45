"""Following one channel axis through operators that treat every channel alike.

An operator is *channel-uniform* in some of its operands if it computes each output channel from the same input channel,
by the same linear map for all of them: sums, views, slices and joins along other axes, pooling over positions, masks
and factors that do not depend on the channel. Such operators commute with every linear map over channels, the removal
of the mean over channels among them, and that is what the residual-stream analysis needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from xform.graph.dims import product_of_sizes
from xform.graph.values import attribute, constant, is_constant, is_op, rank_of, scalar, shape_of

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# An answer of this module: index of an operand -> its channel axis, or why the operator is not channel-uniform.
Operands = Mapping[int, int] | str


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
    inner = product_of_sizes(here[axis + 1 :])
    for index, size in enumerate(there):
        if size == here[axis] and inner is not None and product_of_sizes(there[index + 1 :]) == inner:
            return index
    return None


def operands(node: ir.Node, axis: int, output: int = 0) -> Operands:
    """The operands that carry the channels of an output, and on which of their axes.

    Operands that are left out (masks, factors per position, shapes, indices) do not depend on the channel.

    Args:
        node: Any node.
        axis: The channel axis of the output, counted from the front.
        output: Index of the output.
    """
    if not is_op(node, *_RULES):
        return f"{node.op_type} does not treat all channels alike"
    if output and node.op_type != "Split":
        return f"output {output} of {node.op_type} is no part of its first one"
    size = _dim(node.outputs[output], axis)
    found = _RULES[node.op_type](node, axis)
    if isinstance(found, str):
        return found
    for index, inner in found.items():
        if not isinstance(size, int) or _dim(node.inputs[index], inner) != size:
            return f"{node.op_type} does not keep the channels as one axis"
    return found


def results(node: ir.Node, index: int, axis: int) -> Mapping[int, int] | str:
    """The outputs that carry the channels of an operand: index of the output -> axis; or why there are none.

    Args:
        node: A reader.
        index: Which of its operands is asked about.
        axis: The channel axis of that operand.
    """
    carried: dict[int, int] = {}
    reason = f"{node.op_type} does not keep the channels as one axis"
    if is_op(node, "Concat", "Split") and int(attribute(node, "axis", 0)) % (rank_of(node.inputs[index]) or 1) == axis:
        return f"{node.op_type} joins or splits the channels"
    if not is_op(node, *_RULES):
        return f"{node.op_type} does not treat all channels alike"
    for number, value in enumerate(node.outputs):
        for outer in range(rank_of(value) or 0):
            found = operands(node, outer, number)
            if isinstance(found, str):
                reason = found if _dim(value, outer) == _dim(node.inputs[index], axis) else reason
            elif found.get(index) == axis:
                carried[number] = outer
                break
        else:
            return reason
    return carried


def _dim(value: ir.Value | None, axis: int) -> int | str | None:
    shape = shape_of(value)
    return shape[axis] if shape is not None and 0 <= axis < len(shape) else None


def _aligned(node: ir.Node, index: int, axis: int) -> int | None:
    """The axis of operand `index` that numpy-broadcasts to `axis` of the output; None if it has one number there."""
    inner, outer = rank_of(node.inputs[index]), rank_of(node.outputs[0])
    if inner is None or outer is None:
        return None
    moved = axis - (outer - inner)
    return moved if moved >= 0 and _dim(node.inputs[index], moved) != 1 else None


def _first(node: ir.Node, axis: int) -> Operands:
    return {0: axis}


def _sum(node: ir.Node, axis: int) -> Operands:
    found: dict[int, int] = {}
    for index in range(len(node.inputs)):
        inner = _aligned(node, index, axis)
        if inner is None:
            return f"{node.op_type} adds one number to all channels"
        found[index] = inner
    return found


def _scaled(node: ir.Node, axis: int) -> Operands:
    """Mul and Div by what does not depend on the channel."""
    found = {i: inner for i in range(len(node.inputs)) if (inner := _aligned(node, i, axis)) is not None}
    if len(found) != 1 or (is_op(node, "Div") and 0 not in found):
        return f"{node.op_type} scales every channel by another factor"
    return found


def _where(node: ir.Node, axis: int) -> Operands:
    if _aligned(node, 0, axis) is not None:
        return "the condition of Where depends on the channel"
    found: dict[int, int] = {}
    for index in (1, 2):
        inner = _aligned(node, index, axis)
        if inner is not None:
            found[index] = inner
        elif scalar(node.inputs[index]) != 0:
            return "Where puts one number into all channels"
    return found or "Where chooses between numbers"


def _cast(node: ir.Node, axis: int) -> Operands:
    source = node.inputs[0]
    floats = source is not None and source.dtype in _FLOATS and node.outputs[0].dtype in _FLOATS
    return {0: axis} if floats else "Cast is not between floats"


def _layout(node: ir.Node, axis: int) -> Operands:
    inner = axis_before(node, axis)
    return f"{node.op_type} does not keep the channels as one axis" if inner is None else {0: inner}


def _expand(node: ir.Node, axis: int) -> Operands:
    inner = _aligned(node, 0, axis)
    return "Expand copies one number to all channels" if inner is None else {0: inner}


def _gather(node: ir.Node, axis: int) -> Operands:
    data, indices = rank_of(node.inputs[0]), rank_of(node.inputs[1])
    if data is None or indices is None:
        return "the rank of Gather is unknown"
    along = int(attribute(node, "axis", 0)) % data
    if along <= axis < along + indices:
        return "Gather picks channels"
    return {0: axis if axis < along else axis - indices + 1}


def _gather_nd(node: ir.Node, axis: int) -> Operands:
    indices = shape_of(node.inputs[1])
    if not indices or not isinstance(indices[-1], int):
        return "how many axes GatherND indexes is not known"
    positions, indexed = len(indices) - 1, indices[-1] + int(attribute(node, "batch_dims", 0))
    return {0: axis - positions + indexed} if axis >= positions else "GatherND picks channels"


def _other_axis(default: int) -> Callable[[ir.Node, int], Operands]:
    """Concat and Split along any axis but the channels'; every operand of the node takes part."""

    def rule(node: ir.Node, axis: int) -> Operands:
        rank = rank_of(node.outputs[0])
        if rank is None or int(attribute(node, "axis", default)) % rank == axis:
            return f"{node.op_type} joins or splits the channels"
        count = len(node.inputs) if is_op(node, "Concat") else 1
        return dict.fromkeys(range(count), axis)

    return rule


def _slice(node: ir.Node, axis: int) -> Operands:
    given = constant(node.inputs[3], max_elements=64) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    rank = rank_of(node.outputs[0])
    if rank is None or (given is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return "the axes of Slice are not constant"
    starts = shape_of(node.inputs[1])
    count = starts[0] if starts and isinstance(starts[0], int) else rank
    axes = range(count) if given is None else [int(a) % rank for a in given.reshape(-1)]
    return "Slice picks channels" if axis in axes else {0: axis}


def _pad(node: ir.Node, axis: int) -> Operands:
    pads, rank = constant(node.inputs[1], max_elements=64), rank_of(node.outputs[0])
    if pads is None or rank is None or pads.size != 2 * rank or len(node.inputs) > 3:
        return "what Pad pads is not known"
    if pads.reshape(-1)[axis] or pads.reshape(-1)[axis + rank]:
        return "Pad pads the channels"
    mode = str(attribute(node, "mode", "constant"))
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    return "Pad puts one number into all channels" if mode == "constant" and fill and scalar(fill) != 0 else {0: axis}


def _reduce(node: ir.Node, axis: int) -> Operands:
    """Sums and means over positions."""
    rank = rank_of(node.inputs[0])
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = constant(given, max_elements=16)
    if rank is None or axes is None or not axes.size:
        return f"the axes of {node.op_type} are not constant"
    reduced = {int(a) % rank for a in axes.reshape(-1)}
    kept = list(range(rank)) if attribute(node, "keepdims", 1) else [a for a in range(rank) if a not in reduced]
    inner = kept[axis] if axis < len(kept) else None
    return f"{node.op_type} sums over the channels" if inner is None or inner in reduced else {0: inner}


def _pool(node: ir.Node, axis: int) -> Operands:
    return {0: 1} if axis == 1 else f"{node.op_type} mixes channels and positions"


_RULES: dict[str, Callable[[ir.Node, int], Operands]] = {
    "Identity": _first,
    "Neg": _first,
    "Cast": _cast,
    "Add": _sum,
    "Sub": _sum,
    "Sum": _sum,
    "Mul": _scaled,
    "Div": _scaled,
    "Where": _where,
    **dict.fromkeys((*VIEWS, "Transpose"), _layout),
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Concat": _other_axis(0),
    "Split": _other_axis(0),
    "Slice": _slice,
    "Pad": _pad,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "GlobalAveragePool": _pool,
    "AveragePool": _pool,
}


def linear_axis(node: ir.Node) -> int | None:
    """The axis of the output channels of a linear map with a constant weight; None for every other node.

    Conv and ConvTranspose have it at 1, MatMul and Gemm at the end. A map without a bias input counts too.
    """
    if not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul") or len(node.inputs) < 2:
        return None
    if not is_constant(node.inputs[1]):
        return None
    if is_op(node, "Conv", "ConvTranspose"):
        return 1
    rank = rank_of(node.outputs[0])
    return rank - 1 if rank and rank_of(node.inputs[1]) == 2 else None

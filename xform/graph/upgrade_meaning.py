"""Upward adapters for operators whose meaning changed: the old meaning is spelled out in the newer operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from xform.graph.opset_emit import Emitter, set_attribute, set_input
from xform.graph.upgrade_steps import refuse, step
from xform.graph.values import attribute, constant, rank_of, shape_of


@step(9, "BatchNormalization")
def _batch_norm_9(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """`spatial=0` had statistics per activation instead of per channel: the formula, written out with broadcasting."""
    spatial = attribute(node, "spatial", 1)
    node.attributes.pop("spatial", None)
    if spatial:
        return None
    x, scale, bias, mean, variance = node.inputs
    if len(node.outputs) > 1:
        raise refuse(node, 9, "it trains statistics per activation (spatial=0)")
    if x is None or x.dtype is None:
        raise refuse(node, 9, "the type of its input is unknown")
    epsilon = emit.like(attribute(node, "epsilon", 1e-5), x.dtype, "epsilon")
    deviation = emit.op("Sqrt", emit.op("Add", variance, epsilon))
    normal = emit.op("Div", emit.op("Sub", x, mean), deviation)
    return [emit.op("Add", emit.op("Mul", normal, scale), bias)]


@step(14, "BatchNormalization")
def _batch_norm_14(node: ir.Node, _emit: Emitter) -> None:
    """Training is asked for by an attribute instead of by the number of outputs; the saved statistics are gone."""
    live = [o for o in node.outputs[1:] if o.uses() or o.is_graph_output()]
    if any(o in node.outputs[3:] for o in live):
        raise refuse(node, 14, "its outputs saved_mean or saved_var are read")
    trains = any(o.name for o in node.outputs[1:])
    if trains:
        set_attribute(node, "training_mode", 1)
        node.resize_outputs(min(len(node.outputs), 3))
    else:
        node.resize_outputs(1)


@step(10, "Dropout")
def _dropout_10(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """The mask became boolean."""
    if len(node.outputs) < 2 or not (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        node.resize_outputs(1)
        return None
    x = node.inputs[0]
    dtype = node.outputs[1].dtype or (x.dtype if x is not None else None)
    if dtype is None:
        raise refuse(node, 10, "the type of its mask is unknown")
    output, mask = emit.ops("Dropout", [x], 2, {"ratio": attribute(node, "ratio")})
    return [output, emit.op("Cast", mask, to=int(dtype))]


@step(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax_13(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """All dims from `axis` (default 1) on were normalized together, like a row of a matrix; now only `axis` is."""
    x = node.inputs[0]
    axis, rank = attribute(node, "axis", 1), rank_of(x)
    if axis == -1 or (rank is not None and axis % max(rank, 1) == rank - 1):
        set_attribute(node, "axis", -1)
        return None
    shape = shape_of(x)
    if shape and all(isinstance(size, int) and size > 0 for size in shape[axis % len(shape) :]):
        # constant targets, which hold for batches of none too
        lead = [0] * (axis % len(shape))
        tail = [int(str(size)) for size in shape[len(lead) :]]
        rows = emit.op("Reshape", x, emit.ints([*lead, math.prod(tail)], "shape"))
        return [emit.op("Reshape", emit.op(node.op_type, rows, axis=-1), emit.ints([*lead, *tail], "shape"))]
    rows = emit.op(node.op_type, emit.op("Flatten", x, axis=axis), axis=-1)
    return [emit.op("Reshape", rows, emit.op("Shape", x), allowzero=1)]  # sizes of 0 are sizes, not "as it was"


@step(10, "Upsample")
def _upsample_10(node: ir.Node, _emit: Emitter) -> None:
    """Resize-10 with factors of at least 1 is Upsample."""
    node.op_type = "Resize"


@step(11, "Resize")
def _resize_11(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Resize-10 is asymmetric; runtimes round nearest samples down where it enlarges a dim and up where it shrinks one.

    Where it may do both, it becomes two nodes: nearest samples of one dim do not depend on the other dims.
    """
    x, scales = node.inputs[:2]
    if attribute(node, "mode", "nearest") != "nearest":
        _resize_inputs(node, emit, scales)
        set_attribute(node, "coordinate_transformation_mode", "asymmetric")
        return None
    known = constant(scales)
    if known is not None and (np.all(known >= 1) or np.all(known <= 1)):
        _resize_inputs(node, emit, scales)
        set_attribute(node, "coordinate_transformation_mode", "asymmetric")
        set_attribute(node, "nearest_mode", "floor" if np.all(known >= 1) else "ceil")
        return None
    one = emit.like(1, ir.DataType.FLOAT, "one")
    roi = emit.constant(np.zeros(0, np.float32), "roi")
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
    larger, smaller = _split_scales(emit, scales, known, one)
    enlarged = emit.op("Resize", x, roi, larger, **nearest, nearest_mode="floor")
    return [emit.op("Resize", enlarged, roi, smaller, **nearest, nearest_mode="ceil")]


def _split_scales(
    emit: Emitter, scales: ir.Value | None, known: np.ndarray | None, one: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Factors above 1, and factors below 1."""
    if known is not None:
        return emit.constant(np.maximum(known, 1), "scales_up"), emit.constant(np.minimum(known, 1), "scales_down")
    return emit.op("Max", scales, one), emit.op("Min", scales, one)


def _resize_inputs(node: ir.Node, emit: Emitter, scales: ir.Value | None) -> None:
    set_input(node, 1, emit.constant(np.zeros(0, np.float32), "roi"))
    set_input(node, 2, scales)


@step(21, "GroupNormalization")
def _group_norm_21(node: ir.Node, emit: Emitter) -> None:
    """Scale and bias were per group; now they are per channel."""
    x, groups = node.inputs[0], attribute(node, "num_groups")
    shape = shape_of(x)
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    for index, hint in ((1, "scale"), (2, "bias")):
        per_group = node.inputs[index]
        size = shape_of(per_group)
        if channels == groups or (isinstance(channels, int) and size == (channels,)):
            continue
        known = constant(per_group)
        if known is not None and isinstance(channels, int):
            set_input(node, index, emit.constant(np.repeat(known, channels // groups), hint))
            continue
        count = emit.op("Shape", x, start=1, end=2)
        repeat = emit.op("Concat", emit.ints([1]), emit.op("Div", count, emit.ints([groups])), axis=0)
        column = emit.op("Reshape", per_group, emit.ints([-1, 1]))
        set_input(node, index, emit.op("Reshape", emit.op("Expand", column, repeat), emit.ints([-1])))


@step(13, "Erf")
@step(28, "ReduceLogSum", "ReduceLogSumExp")
def _integers_dropped(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Integer inputs are no longer defined: computed in float64, truncated as runtimes did."""
    x = node.inputs[0]
    if x is None or x.dtype is None or x.dtype.is_floating_point():
        return None
    wide = emit.op("Cast", x, to=int(ir.DataType.DOUBLE))
    kept = {a.name: a for a in node.attributes.values()}
    (result,) = emit.ops(node.op_type, [wide, *node.inputs[1:]], 1, dict(kept))
    return [emit.op("Cast", result, to=int(x.dtype))]


@step(9, "Scan")
def _scan_9(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Scan-8 ran over a batch (dim 0) of sequences (dim 1): a Scan over the batch around one over the sequence."""
    lengths, *values = node.inputs
    if lengths is not None:
        raise refuse(node, 9, "it has sequence lengths")
    body, scanned = attribute(node, "body"), attribute(node, "num_scan_inputs")
    directions = attribute(node, "directions")
    states = len(values) - scanned
    copies = [_without_batch(v, f"{emit.node.name or 'scan'}_row_{i}") for i, v in enumerate(values)]
    names = [f"{emit.node.name or 'scan'}_result_{i}" for i in range(len(node.outputs))]
    attributes = [ir.AttrInt64("num_scan_inputs", scanned), ir.AttrGraph("body", body)]
    node.attributes.pop("body")
    if directions:
        attributes.append(ir.AttrInt64s("scan_input_directions", list(directions)))
    inner = ir.Node("", "Scan", copies, attributes, num_outputs=len(node.outputs), name=f"{emit.node.name}_sequence")
    for index, (value, name) in enumerate(zip(inner.outputs, names, strict=True)):
        value.name = name
        declared = body.outputs[index]
        value.type = declared.type
        if declared.shape is not None and index < states:
            value.shape = declared.shape
    batch = ir.Graph(copies, list(inner.outputs), nodes=[inner], name="batch", opset_imports={"": emit.opset})
    return emit.ops(
        "Scan", values, len(node.outputs), {"num_scan_inputs": len(values), "body": ir.AttrGraph("body", batch)}
    )


def _without_batch(value: ir.Value | None, name: str) -> ir.Value:
    """A formal input for one element of the batch of `value`."""
    row = ir.Value(name=name, type=value.type if value is not None else None)
    if value is not None and value.shape is not None:
        row.shape = ir.Shape(list(value.shape.dims[1:]))
    return row

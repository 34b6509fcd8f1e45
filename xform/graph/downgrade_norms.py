"""Our own bodies of the normalizations, for opsets below the one that introduced them.

ONNX's bodies of LayerNormalization and GroupNormalization take the variance as E[x^2] - E[x]^2, which cancels in
float32 when the mean is large; ours subtract the mean first, like the kernels of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from xform.graph.downgrade_steps import Unavailable, expand, lower
from xform.graph.norms import computing_type
from xform.graph.opset_emit import Emitter, get_input
from xform.graph.values import attribute, rank_of, shape_of


@expand("LayerNormalization")
def layer_norm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the dims from `axis` on; mean and 1 / deviation too."""
    x, dtype = _typed(node)
    axes = _trailing_axes(node)
    stash = computing_type(node, dtype)
    wide = _cast(emit, x, dtype, stash)
    mean = emit.op("ReduceMean", wide, axes=axes, keepdims=1)
    centred = emit.op("Sub", wide, mean)
    variance = emit.op("ReduceMean", emit.op("Mul", centred, centred), axes=axes, keepdims=1)
    deviation = emit.op("Sqrt", emit.op("Add", variance, emit.like(attribute(node, "epsilon", 1e-5), stash, "epsilon")))
    result = _cast(emit, emit.op("Div", centred, deviation), stash, dtype)
    if (scale := get_input(node, 1)) is not None:
        result = emit.op("Mul", result, scale)
    if (bias := get_input(node, 2)) is not None:
        result = emit.op("Add", result, bias)
    outputs = [result]
    if len(node.outputs) > 1:
        outputs.append(emit.op("Identity", mean))
    if len(node.outputs) > 2:
        outputs.append(emit.op("Reciprocal", deviation))
    return outputs


@expand("RMSNormalization")
def rms_norm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """x / sqrt(mean(x^2) + epsilon) * scale, over the dims from `axis` on."""
    x, dtype = _typed(node)
    stash = computing_type(node, dtype)
    wide = _cast(emit, x, dtype, stash)
    squares = emit.op("Mul", wide, wide)
    mean = emit.op("ReduceMean", squares, emit.ints(_trailing_axes(node), "axes"), keepdims=1)
    deviation = emit.op("Sqrt", emit.op("Add", mean, emit.like(attribute(node, "epsilon", 1e-5), stash, "epsilon")))
    result = _cast(emit, emit.op("Div", wide, deviation), stash, dtype)
    return [emit.op("Mul", result, node.inputs[1])]


@lower(21, "GroupNormalization")
@expand("GroupNormalization")
def group_norm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Each group is one channel of an InstanceNormalization; scale and bias follow, per channel.

    Version 18 had scale and bias per group, which cannot say what version 21 says; it, too, is written out.
    """
    if not emit.expands:
        raise Unavailable("scale and bias per channel are newer")
    x, dtype = _typed(node)
    rank, groups = rank_of(x), int(attribute(node, "num_groups"))
    if rank is None:
        raise Unavailable("the rank of its input is unknown")
    scale, bias = node.inputs[1], node.inputs[2]
    if shape_of(scale) == (groups,) and (shape_of(x) or ())[1:2] != (groups,):
        raise Unavailable("scale and bias per group are expected only in opsets 18 to 20")
    stash = ir.DataType(attribute(node, "stash_type", 1))
    rows = emit.op("Reshape", _cast(emit, x, dtype, stash), emit.ints([0, groups, -1], "shape"))
    ones = emit.constant(np.ones(groups, stash.numpy()), "ones")
    zeros = emit.constant(np.zeros(groups, stash.numpy()), "zeros")
    normal = emit.op("InstanceNormalization", rows, ones, zeros, epsilon=attribute(node, "epsilon", 1e-5))
    normal = _cast(emit, emit.op("Reshape", normal, emit.op("Shape", x)), stash, dtype)
    axes = emit.ints(list(range(1, rank - 1)), "axes")
    if rank > 2:
        scale, bias = emit.op("Unsqueeze", scale, axes), emit.op("Unsqueeze", bias, axes)
    return [emit.op("Add", emit.op("Mul", normal, scale), bias)]


def _typed(node: ir.Node) -> tuple[ir.Value, ir.DataType]:
    x = node.inputs[0]
    if x is None or x.dtype is None:
        raise Unavailable("the type of its input is unknown")
    return x, x.dtype


def _cast(emit: Emitter, value: ir.Value, have: ir.DataType, want: ir.DataType) -> ir.Value:
    return value if have == want else emit.op("Cast", value, to=int(want))


def _trailing_axes(node: ir.Node) -> list[int]:
    """The dims from `axis` on, counted from the front where the rank is known."""
    axis, rank = int(attribute(node, "axis", -1)), rank_of(node.inputs[0])
    if rank is not None:
        return list(range(axis % rank, rank))
    if axis >= 0:
        raise Unavailable("the rank of its input is unknown")
    return list(range(axis, 0))

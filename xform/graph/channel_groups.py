"""Activations rounded to int8 by groups of channels, as `passes.integer.grouped_products` writes them in standard ONNX.

    s = Max(ReduceMax(Abs(Reshape(x, [.., K / g, g])), -1) * (1 / 127), tiny)
    G(x) = DequantizeLinear(QuantizeLinear(x, s, axis=-1, block_size=g), s, axis=-1, block_size=g)

Without the Reshape where K = g, and with a second one, behind ReduceMax, where there may be no rows. Backends whose
runtime has such products recognize it here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xform.graph.values import attribute, constant, is_op, rank_of, scalar, shape_of

LARGEST_CODE = 127
_TINIEST = 1e-20  # what scales may be bounded by from below, so that it only concerns groups of zeros


def group_of(read: ir.Value | None) -> tuple[ir.Value, int] | None:
    """What `grouped` made `read` from, and the group; None of anything else."""
    decode = None if read is None else read.producer()
    if decode is None or not is_op(decode, "DequantizeLinear") or len(decode.inputs) != 2:
        return None
    codes, scale = decode.inputs
    encode = None if codes is None else codes.producer()
    if (
        encode is None
        or not is_op(encode, "QuantizeLinear")
        or len(encode.inputs) != 2
        or encode.inputs[1] is not scale
    ):
        return None
    x, group = encode.inputs[0], attribute(encode, "block_size", 0)
    rank = rank_of(x)
    if attribute(encode, "output_dtype", 0) != ir.DataType.INT8 or x is None or x.dtype is not ir.DataType.FLOAT:
        return None
    if scale is None or rank is None or not group or group != attribute(decode, "block_size", 0):
        return None
    if any(attribute(node, "axis", 1) % rank != rank - 1 for node in (encode, decode)):
        return None
    return (x, group) if _is_scale_of(scale, x, group) else None


def _is_scale_of(scale: ir.Value, x: ir.Value, group: int) -> bool:
    """Whether `scale` is max|x| / 127 by groups."""
    chain: list[ir.Node] = []
    value: ir.Value | None = scale
    for op_type in ("Max", "Mul", "ReduceMax", "Abs"):
        node = None if value is None else value.producer()
        if op_type == "ReduceMax" and node is not None and is_op(node, "Reshape"):
            node = None if node.inputs[0] is None else node.inputs[0].producer()
        if node is None or not is_op(node, op_type):
            return False
        chain.append(node)
        value = node.inputs[0]
    if any(len(node.inputs) != 2 for node in chain[:3]):
        return False
    least, factor = scalar(chain[0].inputs[1]), scalar(chain[1].inputs[1])
    if least is None or factor is None or least > _TINIEST or not np.isclose(factor, 1 / LARGEST_CODE, rtol=1e-6):
        return False
    axes = constant(chain[2].inputs[1])
    if axes is None or axes.tolist() != [-1]:
        return False
    whole = shape_of(x)
    return (value is x and whole is not None and whole[-1] == group) or _as_blocks(value, x, group)


def _as_blocks(value: ir.Value | None, x: ir.Value, group: int) -> bool:
    """Whether `value` is `x` with its last axis in blocks, perhaps without a Reshape between that both went through."""
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Reshape"):
        return False
    before = x.producer()
    sources = [x, before.inputs[0]] if before is not None and is_op(before, "Reshape") else [x]
    shape = shape_of(value)
    return node.inputs[0] in sources and shape is not None and shape[-1] == group


__all__ = ["LARGEST_CODE", "group_of"]

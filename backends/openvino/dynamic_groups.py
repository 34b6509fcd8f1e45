"""Products in int8 with scales found at run time, in the form that OpenVINO's own kernels have.

    MatMul(G(x), DequantizeLinear(uint8 weights))   ->   MatMul(x, DequantizeLinear(uint8 weights))
                                                         and DYNAMIC_QUANTIZATION_GROUP_SIZE = g

G rounds to int8 by groups of g channels (`xform.passes.integer.grouped_products`). OpenVINO does that inside its
kernels where the processor has AVX-512 VNNI or AVX2 VNNI, and else multiplies floats, which is closer to the model
still. The setting holds for a whole model, so there has to be one g, and no product that reads an int8 weight may have
a float input: else G is written out in floats (its operators are newer than what OpenVINO reads), with the setting off,
and a remark says why. Without the setting OpenVINO has one of its own (g = 32) for every model with int8 weights, so it
is always said.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from xform.backends.base import Choice
from xform.backends.onnxruntime.emit import Emitter
from xform.graph.channel_groups import group_of
from xform.graph.values import constant_tensor, display_name, is_op, shape_of

SETTING = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
_RULE = "dynamic_quantization"


def take_groups(model: ir.Model) -> tuple[int, list[Choice]]:
    """Leave G out where OpenVINO does it, in place: the group, 0 for none, and what was decided."""
    nodes = [node for node in model.graph.all_nodes() if _reads_codes(node)]
    found = [(node, group_of(node.inputs[0])) for node in nodes]
    grouped = [(node, made) for node, made in found if made is not None]
    if not grouped:
        return 0, []
    groups = sorted({group for _, (_, group) in grouped})
    names = tuple(display_name(node) for node, _ in grouped)
    alone = [display_name(node) for node, made in found if made is None and not _is_decoded(node.inputs[0])]
    if alone or len(groups) > 1:
        why = f"{alone[0]} reads an int8 weight and a float input" if alone else f"groups of {groups} channels"
        emitter = Emitter(model)
        for read, (x, group) in {node.inputs[0]: made for node, made in grouped}.items():
            assert read is not None
            _write_out(emitter, read, x, group)
        common_passes.RemoveUnusedNodesPass()(model)
        return 0, [
            Choice(_RULE, False, names, f"OpenVINO has one setting for all products, but here are {why}", "int8")
        ]
    for node, (x, _) in grouped:
        node.replace_input_with(0, x)
    common_passes.RemoveUnusedNodesPass()(model)
    told = f"inputs are rounded by groups of {groups[0]} channels inside the products"
    return groups[0], [Choice(_RULE, True, names, told, "int8")]


def _write_out(emitter: Emitter, read: ir.Value, x: ir.Value, group: int) -> None:
    """G(x) as round(x / s) s, in operators of every opset."""
    node, shape = read.producer(), shape_of(x)
    assert node is not None and shape is not None and isinstance(shape[-1], int)
    rank, channels = len(shape), shape[-1]
    rows = [0] * (rank - 1)
    site = emitter.at(node)
    scale = site.op("Unsqueeze", node.inputs[1], emitter.ints(rank))
    blocks = site.op("Reshape", x, emitter.ints(*rows, channels // group, group))
    rounded = site.op("Mul", site.op("Round", site.op("Div", blocks, scale)), scale)
    site.replace([(read, site.op("Reshape", rounded, emitter.ints(*rows, channels)))], "int8 by groups: floats")


def _is_decoded(value: ir.Value | None) -> bool:
    """Whether an input comes from codes: of a product in int8 with scales from calibration."""
    return value is not None and is_op(value.producer(), "DequantizeLinear")


def _reads_codes(node: ir.Node) -> bool:
    """Whether a product's weight is a decoded constant of bytes."""
    decode = node.inputs[1].producer() if is_op(node, "MatMul") and node.inputs[1] is not None else None
    codes = constant_tensor(decode.inputs[0]) if is_op(decode, "DequantizeLinear") and decode is not None else None
    return codes is not None and codes.dtype in (ir.DataType.INT8, ir.DataType.UINT8)

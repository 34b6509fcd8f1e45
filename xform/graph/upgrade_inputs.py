"""Upward adapters for operators whose attributes became inputs, or were renamed, dropped or given other defaults."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from xform.graph.opset_emit import Emitter, get_input, set_attribute, set_input
from xform.graph.upgrade_steps import refuse, step
from xform.graph.values import attribute, constant, rank_of, shape_of

EQUAL_SPLIT = "xform.equal_split"  # node.meta: its definition allowed equal parts only
_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip
_ARITHMETIC = ("Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor")
_CONSUMING = (
    "Abs", "Add", "BatchNormalization", "Ceil", "Clip", "Div", "Dropout", "Elu", "Exp", "Floor", "HardSigmoid",
    "InstanceNormalization", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mul", "Neg", "PRelu", "Reciprocal", "Relu",
    "Sigmoid", "Sqrt", "Sub", "Sum", "Tanh",
)  # fmt: skip


@step(6, *_CONSUMING)
def _drop_consumed_inputs(node: ir.Node, _emit: Emitter) -> None:
    """Memory hints of opset 1 mean nothing any more."""
    node.attributes.pop("consumed_inputs", None)


@step(6, "Selu")
def _selu_6(node: ir.Node, _emit: Emitter) -> None:
    """The default constants gained digits; a node that relied on the old ones keeps them."""
    node.attributes.pop("consumed_inputs", None)
    for name, old in (("alpha", 1.6732), ("gamma", 1.0507)):
        if name not in node.attributes:
            set_attribute(node, name, old)


@step(6, "Cast")
def _cast_6(node: ir.Node, _emit: Emitter) -> None:
    """`to` was the name of the type."""
    to = attribute(node, "to")
    if isinstance(to, str):
        set_attribute(node, "to", int(onnx.TensorProto.DataType.Value(to)))


@step(4, "Concat")
def _concat_4(node: ir.Node, _emit: Emitter) -> None:
    """`axis` had the default 1."""
    if "axis" not in node.attributes:
        set_attribute(node, "axis", 1)


@step(7, *_ARITHMETIC)
def _broadcast_7(node: ir.Node, emit: Emitter) -> None:
    """Limited broadcasting: with `axis`, the second operand lines up with the dims of the first from `axis` on."""
    axis = attribute(node, "axis")
    broadcast = attribute(node, "broadcast", 0)
    node.attributes.pop("axis", None)
    node.attributes.pop("broadcast", None)
    if not broadcast or axis is None:
        return
    a, b = node.inputs
    rank_a, rank_b = rank_of(a), rank_of(b)
    if rank_a is None or rank_b is None:
        raise refuse(node, 7, "the ranks of its operands are unknown, and they decide how it broadcasts along `axis`")
    trailing = rank_a - (axis % rank_a) - rank_b
    if rank_b and trailing > 0:
        axes = list(range(rank_b, rank_b + trailing))
        set_input(node, 1, emit.op("Unsqueeze", b, axes=axes))


@step(7, "PRelu")
def _prelu_7(node: ir.Node, emit: Emitter) -> None:
    """The slope was one number or one per channel; now it broadcasts from the last dim."""
    x, slope = node.inputs
    shape = shape_of(slope)
    if shape is None or len(shape) != 1 or shape[0] == 1:
        return
    rank = rank_of(x)
    if rank is None:
        raise refuse(node, 7, "the rank of its input is unknown, and it decides how the slope broadcasts")
    if rank > 2:
        set_input(node, 1, emit.op("Unsqueeze", slope, axes=list(range(1, rank - 1))))


@step(7, "Gemm")
def _gemm_7(node: ir.Node, _emit: Emitter) -> None:
    node.attributes.pop("broadcast", None)


@step(7, "BatchNormalization", "Dropout")
def _drop_is_test(node: ir.Node, _emit: Emitter) -> None:
    """From opset 7 on, the number of outputs says whether this is training; captured models are for inference."""
    node.attributes.pop("is_test", None)


@step(3, "GRU")
def _gru_3(node: ir.Node, _emit: Emitter) -> None:
    """The default direction was misspelled."""
    if attribute(node, "direction") == "foward":
        set_attribute(node, "direction", "forward")


@step(7, "GRU", "LSTM", "RNN")
def _recurrent_7(node: ir.Node, _emit: Emitter) -> None:
    node.attributes.pop("output_sequence", None)


@step(2, "GlobalLpPool", "LpPool")
def _lp_pool_2(node: ir.Node, _emit: Emitter) -> None:
    """`p` became an integer."""
    p = attribute(node, "p", 2.0)
    if p != int(p):
        raise refuse(node, 2, f"its norm of order {p} is not a whole number")
    set_attribute(node, "p", int(p))


@step(2, "Pad")
def _pad_2(node: ir.Node, _emit: Emitter) -> None:
    if "paddings" in node.attributes:
        set_attribute(node, "pads", list(attribute(node, "paddings")))
        node.attributes.pop("paddings")


@step(5, "Reshape")
def _reshape_5(node: ir.Node, emit: Emitter) -> None:
    node.attributes.pop("consumed_inputs", None)
    if "shape" in node.attributes:
        set_input(node, 1, emit.ints(attribute(node, "shape"), "shape"))
        node.attributes.pop("shape")


@step(2, "Split")
def _split_2(node: ir.Node, _emit: Emitter) -> None:
    """Sizes could be an input; the first definition had no default axis, runtimes took 0."""
    sizes = get_input(node, 1)
    if sizes is not None:
        known = constant(sizes)
        if known is None:
            raise refuse(node, 2, "its sizes are computed at run time")
        set_attribute(node, "split", [int(v) for v in known.reshape(-1)])
        node.resize_inputs(1)


@step(6, "Tile")
def _tile_6(node: ir.Node, emit: Emitter) -> None:
    """One axis with a count became one count per axis."""
    tiles, axis, rank = constant(get_input(node, 1)), constant(get_input(node, 2)), rank_of(node.inputs[0])
    if tiles is None or axis is None or rank is None:
        raise refuse(node, 6, "its tiles, axis or input rank are unknown")
    repeats = [1] * rank
    repeats[int(axis.reshape(-1)[0])] = int(tiles.reshape(-1)[0])
    node.resize_inputs(2)
    set_input(node, 1, emit.ints(repeats, "repeats"))


@step(7, "Upsample")
def _upsample_7(node: ir.Node, _emit: Emitter) -> None:
    if "height_scale" in node.attributes:
        scales = [1.0, 1.0, float(attribute(node, "height_scale")), float(attribute(node, "width_scale"))]
        node.attributes.pop("height_scale")
        node.attributes.pop("width_scale")
        set_attribute(node, "scales", scales)


@step(9, "Upsample")
def _upsample_9(node: ir.Node, emit: Emitter) -> None:
    scales = np.asarray(attribute(node, "scales"), dtype=np.float32)
    node.attributes.pop("scales")
    set_input(node, 1, emit.constant(scales, "scales"))


@step(10, "Slice")
def _slice_10(node: ir.Node, emit: Emitter) -> None:
    for index, name in ((1, "starts"), (2, "ends"), (3, "axes")):
        if name in node.attributes:
            set_input(node, index, emit.ints(attribute(node, name), name))
            node.attributes.pop(name)


@step(10, "TopK")
def _topk_10(node: ir.Node, emit: Emitter) -> None:
    set_input(node, 1, emit.ints([attribute(node, "k")], "k"))
    node.attributes.pop("k")


@step(11, "Clip")
def _clip_11(node: ir.Node, emit: Emitter) -> None:
    """Bounds became inputs. An omitted bound means the greatest or lowest finite number, before and after."""
    for index, name in ((1, "min"), (2, "max")):
        bound = attribute(node, name)
        if bound is not None:
            node.attributes.pop(name)
            limits = np.finfo(np.float16) if _dtype(node, 11) == ir.DataType.FLOAT16 else np.finfo(np.float32)
            number = np.clip(bound, float(limits.min), float(limits.max))
            set_input(node, index, emit.like(number, _dtype(node, 11), name))


@step(11, "Pad")
def _pad_11(node: ir.Node, emit: Emitter) -> None:
    set_input(node, 1, emit.ints(attribute(node, "pads"), "pads"))
    node.attributes.pop("pads")
    value = attribute(node, "value")
    node.attributes.pop("value", None)
    if value:
        set_input(node, 2, emit.like(value, _dtype(node, 11), "value"))


def _dtype(node: ir.Node, version: int) -> ir.DataType:
    value = node.inputs[0]
    if value is None or value.dtype is None:
        raise refuse(node, version, "the type of its input is unknown", "run shape inference on the model first")
    return value.dtype


@step(12, "Dropout")
def _dropout_12(node: ir.Node, emit: Emitter) -> None:
    """The ratio became an input, and training has to be asked for. At inference this is the identity."""
    ratio = attribute(node, "ratio", 0.5)
    node.attributes.pop("ratio", None)
    set_input(node, 1, emit.like(ratio, ir.DataType.FLOAT, "ratio"))


@step(13, "Squeeze", "Unsqueeze", "ReduceSum")
@step(18, *_REDUCTIONS)
def _axes_to_input(node: ir.Node, emit: Emitter) -> None:
    """No axes means every axis (Squeeze: every axis of size 1), before and after."""
    axes = attribute(node, "axes")
    node.attributes.pop("axes", None)
    if axes is not None and (len(axes) or node.op_type.endswith("queeze")):
        set_input(node, 1, emit.ints(axes, "axes"))


@step(13, "Split")
def _split_13(node: ir.Node, emit: Emitter) -> None:
    sizes = attribute(node, "split")
    node.attributes.pop("split", None)
    if sizes is not None:
        set_input(node, 1, emit.ints(sizes, "split"))


@step(18, "Split")
def _split_18(node: ir.Node, _emit: Emitter) -> None:
    """An equal split has to say into how many parts."""
    if get_input(node, 1) is None:
        set_attribute(node, "num_outputs", len(node.outputs))
        node.meta[EQUAL_SPLIT] = True


@step(16, "RoiAlign")
def _roi_align_16(node: ir.Node, _emit: Emitter) -> None:
    """The default gained a half-pixel shift."""
    if "coordinate_transformation_mode" not in node.attributes:
        set_attribute(node, "coordinate_transformation_mode", "output_half_pixel")


@step(20, "DFT")
def _dft_20(node: ir.Node, emit: Emitter) -> None:
    """`axis` became an input, and its default went from 1 to -2."""
    set_input(node, 2, emit.constant(np.asarray(attribute(node, "axis", 1), dtype=np.int64), "axis"))
    node.attributes.pop("axis", None)


@step(20, "GridSample")
def _grid_sample_20(node: ir.Node, _emit: Emitter) -> None:
    """Modes were renamed when volumes came in."""
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    mode = attribute(node, "mode", "bilinear")
    set_attribute(node, "mode", renamed.get(mode, mode))


@step(11, "Scatter")
def _scatter_11(node: ir.Node, _emit: Emitter) -> None:
    """Renamed; the definition of ScatterElements-11 is the same."""
    node.op_type = "ScatterElements"

"""Downward adapters: inputs become attributes again, new defaults are checked away. Reverse of `upgrade_inputs`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from xform.graph.downgrade_steps import Unavailable, drop_defaults, lower, nonnegative_axes
from xform.graph.opset_emit import Emitter, get_input, set_attribute, set_input
from xform.graph.upgrade_inputs import EQUAL_SPLIT
from xform.graph.values import Array, attribute, constant, rank_of, shape_of

_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip
_NEGATIVE_AXES_SINCE_11 = (
    "ArgMax", "ArgMin", "Compress", "Concat", "Gather", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Split", "Squeeze",
    "Unsqueeze",
    "Softmax", "LogSoftmax", "Hardmax", "Flatten",
)  # fmt: skip


@lower(11, *_NEGATIVE_AXES_SINCE_11)
def _axes_from_the_front(node: ir.Node, _emit: Emitter) -> None:
    nonnegative_axes(node)


def known_input(node: ir.Node, index: int, name: str) -> Array:
    """The data of a constant input that the older version takes as an attribute."""
    array = constant(get_input(node, index))
    if array is None:
        raise Unavailable(f"{name} is computed at run time, and is a fixed attribute there")
    return array


@lower(18, *_REDUCTIONS)
@lower(13, "ReduceSum")
def _reduce(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    axes = get_input(node, 1)
    empty = axes is None or shape_of(axes) == (0,)
    if empty and attribute(node, "noop_with_empty_axes", 0):
        return [emit.op("Identity", node.inputs[0])] if _keeps(node.op_type) else [_elementwise(node, emit)]
    if not empty:
        set_attribute(node, "axes", known_input(node, 1, "axes").reshape(-1).tolist())
    node.resize_inputs(1)
    node.attributes.pop("noop_with_empty_axes", None)
    return None


def _keeps(op_type: str) -> bool:
    return op_type in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceLogSumExp")


def _elementwise(node: ir.Node, emit: Emitter) -> ir.Value:
    """A reduction over no axis of the kinds that still change every element."""
    x = node.inputs[0]
    if node.op_type in ("ReduceL1", "ReduceL2"):
        return emit.op("Abs", x)
    return emit.op("Log", x) if node.op_type == "ReduceLogSum" else emit.op("Mul", x, x)


@lower(13, "Squeeze", "Unsqueeze")
def _squeeze(node: ir.Node, _emit: Emitter) -> None:
    if get_input(node, 1) is not None:
        set_attribute(node, "axes", known_input(node, 1, "axes").reshape(-1).tolist())
    node.resize_inputs(1)


@lower(18, "Split")
def _split_18(node: ir.Node, emit: Emitter) -> None:
    """Uneven parts have to be spelled out: all of ceil(n / parts), the last one smaller."""
    if node.meta.get(EQUAL_SPLIT):
        node.attributes.pop("num_outputs", None)
        return
    parts = attribute(node, "num_outputs")
    node.attributes.pop("num_outputs", None)
    if parts is None or get_input(node, 1) is not None:
        return
    shape = shape_of(node.inputs[0])
    size = shape[attribute(node, "axis", 0)] if shape is not None else None
    if not isinstance(size, int):
        set_input(node, 1, _sizes(node, emit, parts))
    elif size % parts:
        chunk = -(-size // parts)
        sizes = [min(chunk, max(0, size - i * chunk)) for i in range(parts)]
        set_input(node, 1, emit.ints(sizes, "split"))


def _sizes(node: ir.Node, emit: Emitter, parts: int) -> ir.Value:
    """The sizes of the parts of a dim that is known at run time."""
    axis = attribute(node, "axis", 0)
    rank = rank_of(node.inputs[0])
    if axis < 0 and rank is None:
        raise Unavailable("the split dim counts from the end, and the rank of the input is unknown")
    place = emit.ints([axis % rank if rank else axis], "axis")
    size = emit.op("Gather", emit.op("Shape", node.inputs[0]), place, axis=0)
    chunk = emit.op("Div", emit.op("Add", size, emit.ints([parts - 1])), emit.ints([parts]))
    rest = emit.op("Sub", size, emit.op("Mul", chunk, emit.ints([parts - 1])))
    return emit.op("Concat", *[chunk] * (parts - 1), rest, axis=0)


@lower(13, "Split")
def _split_13(node: ir.Node, _emit: Emitter) -> None:
    if get_input(node, 1) is not None:
        set_attribute(node, "split", known_input(node, 1, "split").reshape(-1).tolist())
    node.resize_inputs(1)


@lower(18, "Pad")
def _pad_18(node: ir.Node, emit: Emitter) -> None:
    """Pads of some axes become pads of all."""
    if get_input(node, 3) is None:
        return
    axes, pads = known_input(node, 3, "axes").reshape(-1), get_input(node, 1)
    rank = rank_of(node.inputs[0])
    if rank is None:
        raise Unavailable("it pads some axes of an input of unknown rank")
    known = constant(pads)
    count = len(axes)
    if known is not None:
        full = np.zeros(2 * rank, np.int64)
        full[axes % rank], full[axes % rank + rank] = known[:count], known[count:]
        set_input(node, 1, emit.constant(full, "pads"))
    else:
        place = np.full(2 * rank, 2 * count, np.int64)
        place[axes % rank], place[axes % rank + rank] = np.arange(count), np.arange(count) + count
        with_zero = emit.op("Concat", pads, emit.ints([0]), axis=0)
        set_input(node, 1, emit.op("Gather", with_zero, emit.constant(place, "places"), axis=0))
    node.resize_inputs(3)


@lower(19, "Pad")
def _pad_19(node: ir.Node, _emit: Emitter) -> None:
    if attribute(node, "mode", "constant") == "wrap":
        raise Unavailable("mode=wrap is newer")


@lower(11, "Pad")
def _pad_11(node: ir.Node, _emit: Emitter) -> None:
    set_attribute(node, "pads", known_input(node, 1, "pads").tolist())
    if get_input(node, 2) is not None:
        set_attribute(node, "value", float(known_input(node, 2, "the padding value").reshape(())))
    node.resize_inputs(1)


@lower(10, "Slice")
def _slice_10(node: ir.Node, _emit: Emitter) -> None:
    if get_input(node, 4) is not None and np.any(known_input(node, 4, "steps") != 1):
        raise Unavailable("steps other than 1 are newer")
    rank = rank_of(node.inputs[0])
    for index, name in ((1, "starts"), (2, "ends"), (3, "axes")):
        if get_input(node, index) is not None:
            values = known_input(node, index, name).reshape(-1)
            if name == "axes" and np.any(values < 0):
                if rank is None:
                    raise Unavailable("axes count from the end, and the rank of the input is unknown")
                values = values % rank
            set_attribute(node, name, values.tolist())
    node.resize_inputs(1)


@lower(11, "TopK")
def _topk_11(node: ir.Node, _emit: Emitter) -> None:
    """Without the attribute, the result is sorted."""
    if attribute(node, "sorted", 1) in (0, 1):
        node.attributes.pop("sorted", None)


@lower(10, "TopK")
def _topk_10(node: ir.Node, _emit: Emitter) -> None:
    set_attribute(node, "k", int(known_input(node, 1, "k").reshape(())))
    node.resize_inputs(1)


@lower(12, "Clip")
def _clip_12(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Integers could not be clipped."""
    x = node.inputs[0]
    if x is None or x.dtype is None or x.dtype.is_floating_point():
        return None
    low, high = get_input(node, 1), get_input(node, 2)
    result = _choose(emit, "Greater", x, low) if low is not None else x
    result = _choose(emit, "Less", result, high) if high is not None else result
    return [result if result is not x else emit.op("Identity", x)]


@lower(12, "Max", "Min")
def _extreme_12(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Integers had no Max and Min, but could be compared."""
    first, *others = (v for v in node.inputs if v is not None)
    if first.dtype is None or first.dtype.is_floating_point():
        return None
    result = first
    for other in others:
        result = _choose(emit, "Greater" if node.op_type == "Max" else "Less", result, other)
    return [result if result is not first else emit.op("Identity", first)]


def _choose(emit: Emitter, comparison: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """Element by element, `a` where the comparison holds, else `b`."""
    return emit.op("Where", emit.op(comparison, a, b), a, b)


@lower(11, "Clip")
def _clip_11(node: ir.Node, _emit: Emitter) -> None:
    for index, name in ((1, "min"), (2, "max")):
        if get_input(node, index) is not None:
            set_attribute(node, name, float(known_input(node, index, name).reshape(()).astype(np.float32)))
    node.resize_inputs(1)


@lower(12, "Dropout")
def _dropout_12(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """At inference the mask is all true; some runtimes gave another one in older versions, so it is written out."""
    training = get_input(node, 2)
    if training is not None and bool(known_input(node, 2, "training_mode").reshape(())):
        raise Unavailable("training_mode is newer")
    x, ratio = node.inputs[0], get_input(node, 1)
    masks = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    if ratio is not None and constant(ratio) is None and not masks:
        return [emit.op("Identity", x)]
    if masks:
        kept = ir.AttrTensor("value", ir.tensor(np.asarray([True])))
        return [emit.op("Identity", x), emit.op("ConstantOfShape", emit.op("Shape", x), value=kept)]
    if ratio is not None:
        set_attribute(node, "ratio", float(known_input(node, 1, "ratio").reshape(())))
    node.attributes.pop("seed", None)
    node.resize_inputs(1)
    return None


@lower(10, "Dropout")
def _dropout_10(node: ir.Node, _emit: Emitter) -> None:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise Unavailable("the mask is not boolean there")
    node.resize_outputs(1)


@lower(20, "DFT")
def _dft_20(node: ir.Node, _emit: Emitter) -> None:
    axis = int(known_input(node, 2, "axis").reshape(())) if get_input(node, 2) is not None else -2
    rank = rank_of(node.inputs[0])
    if axis < 0 and rank is None:
        raise Unavailable("the axis counts from the end, and the rank of the input is unknown")
    set_attribute(node, "axis", axis + rank if axis < 0 and rank is not None else axis)
    node.resize_inputs(min(len(node.inputs), 2))


@lower(20, "GridSample")
def _grid_sample_20(node: ir.Node, _emit: Emitter) -> None:
    renamed = {"linear": "bilinear", "cubic": "bicubic"}
    mode = attribute(node, "mode", "linear")
    if rank_of(node.inputs[0]) != 4:
        raise Unavailable("volumes are newer")
    set_attribute(node, "mode", renamed.get(mode, mode))


@lower(16, "RoiAlign")
def _roi_align_16(node: ir.Node, _emit: Emitter) -> None:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") != "output_half_pixel":
        raise Unavailable("coordinate_transformation_mode other than output_half_pixel is newer")
    node.attributes.pop("coordinate_transformation_mode")


@lower(16, "ScatterElements", "ScatterND")
@lower(18, "ScatterElements", "ScatterND")
def _scatter_reduction(node: ir.Node, _emit: Emitter) -> None:
    reduction = attribute(node, "reduction", "none")
    if reduction in ("max", "min"):
        raise Unavailable(f"reduction={reduction} is newer")


@lower(15, "Shape")
def _shape_15(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Part of a shape is a slice of it."""
    start, end = attribute(node, "start", 0), attribute(node, "end")
    if not start and end is None:
        node.attributes.pop("start", None)
        return None
    whole = emit.op("Shape", node.inputs[0])
    ends = emit.ints([end if end is not None else np.iinfo(np.int64).max], "end")
    return [emit.op("Slice", whole, emit.ints([start], "start"), ends, emit.ints([0], "axes"))]


@lower(14, "Reshape")
def _reshape_14(node: ir.Node, _emit: Emitter) -> None:
    if attribute(node, "allowzero", 0) and np.any(known_input(node, 1, "shape with allowzero=1") == 0):
        raise Unavailable("allowzero=1 with a 0 in the shape is newer")
    node.attributes.pop("allowzero", None)


@lower(19, "Cast", "CastLike", "QuantizeLinear")
def _saturate_19(node: ir.Node, _emit: Emitter) -> None:
    """Only for 8-bit floats, which do not exist below."""
    node.attributes.pop("saturate", None)


@lower(24, "Cast", "CastLike")
def _round_mode_24(node: ir.Node, _emit: Emitter) -> None:
    """Only for 8-bit exponents, which do not exist below."""
    node.attributes.pop("round_mode", None)


@lower(13, "QuantizeLinear", "DequantizeLinear")
def _quantize_13(node: ir.Node, _emit: Emitter) -> None:
    shape = shape_of(node.inputs[1])
    if shape not in ((), (1,)):
        raise Unavailable("scales per axis are newer")
    node.attributes.pop("axis", None)


@lower(21, "QuantizeLinear")
def _quantize_21(node: ir.Node, emit: Emitter) -> None:
    """The output type is that of the zero point."""
    dtype = attribute(node, "output_dtype", 0)
    node.attributes.pop("output_dtype", None)
    if dtype and get_input(node, 2) is None:
        shape = shape_of(node.inputs[1])
        if shape is None or not all(isinstance(d, int) for d in shape):
            raise Unavailable("output_dtype is newer, and the shape of a zero point is unknown")
        zeros = np.zeros([d for d in shape if isinstance(d, int)], ir.DataType(dtype).numpy())
        set_input(node, 2, emit.constant(zeros, "zero_point"))
    drop_defaults(node, 21, 19)


@lower(21, "DequantizeLinear")
def _dequantize_21(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Scales by blocks: (q - z) s over the blocked axis split in two; exact, as codes are whole numbers."""
    x, scale, zero = node.inputs[0], node.inputs[1], get_input(node, 2)
    assert x is not None and scale is not None
    block = attribute(node, "block_size", 0)
    node.attributes.pop("block_size", None)
    if not block:
        return None
    shape = shape_of(x)
    if shape is None or scale.dtype is None or not all(isinstance(d, int) for d in shape):
        raise Unavailable("scales by blocks are newer, and the shape of the codes is unknown")
    sizes = [d for d in shape if isinstance(d, int)]
    axis = attribute(node, "axis", 1) % len(sizes)
    if sizes[axis] % block:
        raise Unavailable("scales by blocks are newer, and the last block is smaller")
    split = [*sizes[:axis], sizes[axis] // block, block, *sizes[axis + 1 :]]
    dtype, within = int(scale.dtype), emit.ints([axis + 1], "within_block")
    codes = emit.op("Cast", emit.op("Reshape", x, emit.ints(split, "blocks")), to=dtype)
    if zero is not None:
        codes = emit.op("Sub", codes, emit.op("Cast", emit.op("Unsqueeze", zero, within), to=dtype))
    result = emit.op("Mul", codes, emit.op("Unsqueeze", scale, within))
    return [emit.op("Reshape", result, emit.ints(sizes, "shape"))]


@lower(23, "QuantizeLinear", "DequantizeLinear")
def _quantize_23(node: ir.Node, _emit: Emitter) -> None:
    """A precision or output type equal to that of the scale says nothing."""
    scale = node.inputs[1]
    for name in ("precision", "output_dtype") if node.op_type == "QuantizeLinear" else ("output_dtype",):
        asked = attribute(node, name, 0)
        if name == "precision" or node.op_type == "DequantizeLinear":
            if asked and (scale is None or scale.dtype != asked):
                raise Unavailable(f"{name}={asked} is newer")
            node.attributes.pop(name, None)


@lower(20, "ReduceMax", "ReduceMin")
def _reduce_bool_20(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Booleans through integers."""
    x = node.inputs[0]
    if x is None or x.dtype != ir.DataType.BOOL:
        return None
    as_int = emit.op("Cast", x, to=int(ir.DataType.INT32))
    kept = {a.name: a for a in node.attributes.values()}
    (reduced,) = emit.ops(node.op_type, [as_int, *node.inputs[1:]], 1, dict(kept))
    return [emit.op("Cast", reduced, to=int(ir.DataType.BOOL))]


@lower(11, "Gemm")
def _gemm_11(node: ir.Node, emit: Emitter) -> None:
    if get_input(node, 2) is None:
        x = node.inputs[0]
        if x is None or x.dtype is None:
            raise Unavailable("C may be omitted only in newer versions, and its type is unknown")
        set_input(node, 2, emit.like(0, x.dtype, "zero"))


@lower(12, "Pow")
def _pow_12(node: ir.Node, emit: Emitter) -> None:
    """The exponent had the type of the base."""
    base, exponent = node.inputs
    if base is None or exponent is None or base.dtype is None or exponent.dtype is None:
        raise Unavailable("the types of base and exponent are unknown")
    if base.dtype != exponent.dtype:
        if not base.dtype.is_floating_point():
            raise Unavailable("base and exponent have different types")
        set_input(node, 1, emit.op("Cast", exponent, to=int(base.dtype)))

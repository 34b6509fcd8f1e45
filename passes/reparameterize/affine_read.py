"""Nodes as affine maps: which operand, over which channel axis, by which map.

`read(node, axis)` gives the parts whose sum the node computes when the channels of its result lie on `axis`:

    Conv, ConvTranspose, MatMul with a constant matrix     one part
    BatchNormalization with fixed statistics               one part, a factor and a shift per channel
    Add, Sub, Mul, Div with one number per channel         one part
    AveragePool                                            one part: a depthwise kernel of 1/taps. Only where every
                                                           window divides by the same number: no padding, or
                                                           count_include_pad=1, and no window added by ceil_mode
    Pad with zeros on spatial axes                         one part: one tap, shifted
    Add, Sub, Sum of values of one shape                   a part for each operand
    Neg                                                    one part

For what only nearly is affine it gives the reason as text; for everything else an empty text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, constant, display_name, is_op, rank_of, shape_of
from xform.passes.reparameterize.affine_map import AffineMap, Arrays, Window, identity, scaling
from xform.passes.reparameterize.channel_path import affine_of
from xform.passes.reparameterize.constant_expression import evaluate, expression
from xform.passes.reparameterize.linear_map import FLOATS
from xform.patterns import batch_norm

DENSE = ("Conv", "ConvTranspose", "MatMul")
OPERATORS = (*DENSE, "BatchNormalization", "Add", "Sub", "Sum", "Mul", "Div", "Neg", "AveragePool", "Pad")
QUIET_REASON = ""  # not affine at all, about which there is nothing to tell
SMALL_WEIGHT = 1 << 20  # elements; a larger weight is never read just to see whether it is zero


@dataclass(frozen=True)
class Part:
    """One summand: `map` applied to `operand`, whose channels lie on `axis`."""

    operand: ir.Value
    axis: int
    map: AffineMap


def read(node: ir.Node, axis: int, *, lenient: bool = False) -> Sequence[Part] | str:
    """The parts of `node`, or why it has none.

    Args:
        lenient: Take what is nearly affine for affine, to see what it would cost. Such a map must not be computed.
    """
    if not is_op(node, *OPERATORS):
        return QUIET_REASON
    output = node.outputs[0]
    if output.dtype is not None and output.dtype not in FLOATS:
        return f"{node.op_type} computes with {output.dtype.name}"
    if is_op(node, "Conv", "ConvTranspose"):
        return _convolution(node, axis, lenient)
    if is_op(node, "MatMul"):
        return _product(node, axis, lenient)
    if is_op(node, "BatchNormalization"):
        return _batch_norm(node, axis)
    if is_op(node, "AveragePool"):
        return _average_pool(node, axis, lenient)
    if is_op(node, "Pad"):
        return _pad(node, axis, lenient)
    return _arithmetic(node, axis)


def channel_axes(node: ir.Node) -> tuple[int, ...]:
    """The axes of the result on which channels may lie."""
    rank = rank_of(node.outputs[0])
    if rank is None or rank < 2:
        return ()
    if is_op(node, "Conv", "ConvTranspose", "BatchNormalization", "AveragePool", "Pad"):
        return (1,)
    if is_op(node, "MatMul") or rank == 2:
        return (rank - 1,)
    return (1, rank - 1)


def channels_of(value: ir.Value | None, axis: int) -> int | None:
    """The static number of channels on `axis`, or None."""
    shape = shape_of(value)
    if shape is None or not 0 <= axis < len(shape):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def outputs_of(node: ir.Node, axis: int) -> int | None:
    """The number of channels of the result, also where its declared shape leaves it open."""
    known = channels_of(node.outputs[0], axis)
    if known is not None:
        return known
    if is_op(node, *DENSE):
        shape = _static(node.inputs[1])
        place = 0 if is_op(node, "Conv") else 1
        group = int(attribute(node, "group", 1)) if is_op(node, "ConvTranspose") else 1
        return shape[place] * group if len(shape) > place else None
    sizes = {channels_of(v, axis) for v in node.inputs if v is not None and rank_of(v) == rank_of(node.outputs[0])}
    return max((s for s in sizes if s is not None), default=None)


def is_zero(value: ir.Value | None) -> bool:
    """Whether a constant consists of zeros; False for one of more than `SMALL_WEIGHT` elements, which is not read."""
    array = constant(value, max_elements=SMALL_WEIGHT)
    if array is None or np.any(array.reshape(-1)[:64]):  # most weights are told by their first numbers
        return False
    return not np.any(array)


def weight_problem(value: ir.Value | None, node: ir.Node, lenient: bool = False) -> str | None:
    """Why the weight `value` of `node` cannot take part in a merge; None if it can."""
    if value is None or expression(value) is None:
        maker = value.producer() if value is not None else None
        if maker is not None and "Dequantize" in maker.op_type:
            if lenient and _static(value):
                return None
            place = f"{display_name(node)} is quantized ({display_name(maker)})"
            return f"the weight of {place}: merging would requantize it"
        return f"the weight of {display_name(node)} is not constant"
    if value.dtype not in FLOATS:
        return f"the weight of {display_name(node)} is of type {value.dtype.name if value.dtype else 'unknown'}"
    if not _static(value):
        return f"the shape of the weight of {display_name(node)} is not known"
    return None


def _static(value: ir.Value | None) -> tuple[int, ...]:
    """Shape of a constant or constant expression; empty if it is not known or it is a scalar."""
    shape = tuple(s for s in shape_of(value) or () if isinstance(s, int))
    return shape if len(shape) == len(shape_of(value) or ()) else ()


def _convolution(node: ir.Node, axis: int, lenient: bool) -> Sequence[Part] | str:
    transposed = node.op_type == "ConvTranspose"
    weight, given = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    problem = weight_problem(weight, node, lenient)
    if problem is None and given is not None:
        problem = weight_problem(given, node)
    operand = node.inputs[0]
    if problem is not None or operand is None or axis != 1:
        return problem or f"the channels of {node.op_type} lie on axis 1"
    shape, group = _static(weight), int(attribute(node, "group", 1))
    if len(shape) < 3 or group < 1 or shape[0] % group:
        return f"the weight of {node.op_type} does not divide into {group} groups"
    window = _window(node, shape[2:], transposed=transposed)
    if isinstance(window, str):
        return window
    outputs = shape[1] * group if transposed else shape[0]
    inputs = shape[0] if transposed else shape[1] * group

    def compute() -> Arrays:
        kernel = _wide(weight)
        if transposed:  # [I, O/g, ...] -> [O, I/g, ...]
            blocks = kernel.reshape(group, inputs // group, outputs // group, *shape[2:])
            kernel = np.swapaxes(blocks, 1, 2).reshape(outputs, inputs // group, *shape[2:])
        return kernel, np.zeros(outputs) if given is None else _wide(given)

    unbiased = given is None or is_zero(given)
    mapped = AffineMap(
        inputs, outputs, group, window, unbiased, compute, transposed, _name(weight), zero=is_zero(weight)
    )
    return (Part(operand, 1, mapped),)


def _product(node: ir.Node, axis: int, lenient: bool) -> Sequence[Part] | str:
    operand, weight = node.inputs[0], node.inputs[1]
    problem = weight_problem(weight, node, lenient)
    rank = rank_of(operand)
    if problem is not None or operand is None or rank is None:
        return problem or "the rank of the operand is not known"
    shape = _static(weight)
    if len(shape) != 2 or rank < 2:
        return "the constant operand of MatMul is no matrix"
    if axis != rank - 1:
        return "the channels of MatMul lie on the last axis"

    def compute() -> Arrays:
        return _wide(weight).T, np.zeros(shape[1])

    mapped = AffineMap(shape[0], shape[1], 1, Window(), True, compute, name=_name(weight), zero=is_zero(weight))
    return (Part(operand, axis, mapped),)


def _batch_norm(node: ir.Node, axis: int) -> Sequence[Part] | str:
    norm, operand = batch_norm.read(node), node.inputs[0]
    if isinstance(norm, str):
        return f"{display_name(node)}: {norm}"
    if axis != batch_norm.CHANNEL_AXIS or operand is None:
        return "the channels of BatchNormalization lie on axis 1"
    return (Part(operand, axis, scaling(norm.a, norm.c, len(norm.a))),)


def _average_pool(node: ir.Node, axis: int, lenient: bool) -> Sequence[Part] | str:
    operand, kernel = node.inputs[0], tuple(int(k) for k in attribute(node, "kernel_shape", ()))
    channels = channels_of(operand, 1)
    if operand is None or channels is None or axis != 1:
        return "the number of channels of AveragePool is not known"
    window = _window(node, kernel, transposed=False)
    if isinstance(window, str):
        return window
    if window.pads and not attribute(node, "count_include_pad", 0) and not lenient:
        return f"{display_name(node)} divides by fewer elements at the border (count_include_pad=0)"
    if not lenient and not _always_fits(window, (shape_of(operand) or ())[2:]):
        return f"{display_name(node)} has a window that may be larger than what it reads"
    if attribute(node, "ceil_mode", 0) and not _floor_is_enough(node, window) and not lenient:
        return f"{display_name(node)} adds windows that reach beyond its padding (ceil_mode=1)"

    def compute() -> Arrays:
        return np.full((channels, 1, *kernel), 1 / math.prod(kernel)), np.zeros(channels)

    return (Part(operand, 1, AffineMap(channels, channels, channels, window, True, compute)),)


def _always_fits(window: Window, sizes: Sequence[int | str | None]) -> bool:
    """Whether there is room for a window along every axis; a pool gives nothing elsewhere, a convolution fails."""
    pairs = zip(sizes, window.slack, strict=True)
    return all(slack >= 0 or (isinstance(size, int) and size + slack >= 1) for size, slack in pairs)


def _floor_is_enough(node: ir.Node, window: Window) -> bool:
    """Whether rounding the number of windows down gives as many as the result has."""
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if before is None or after is None:
        return False
    pairs = zip(before[2:], after[2:], window.slack, window.strides, strict=True)
    return all(isinstance(h, int) and (h + slack - 1) // s + 1 == out for h, out, slack, s in pairs)


def _pad(node: ir.Node, axis: int, lenient: bool) -> Sequence[Part] | str:
    operand, mode = node.inputs[0], str(attribute(node, "mode", "constant"))
    rank, channels = rank_of(operand), channels_of(operand, 1)
    if mode != "constant" and not lenient:
        return f"{display_name(node)} pads in {mode} mode, not with zeros"
    if operand is None or rank is None or rank < 3 or channels is None or axis != 1:
        return "the shape of what Pad reads is not known"
    pads, value = constant(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else np.arange(rank)
    if pads is None or axes is None:
        return "the pads are not constant"
    if value is not None and not is_zero(value) and not lenient:
        return f"{display_name(node)} pads with another value than zero"
    begins, ends = np.zeros(rank, np.int64), np.zeros(rank, np.int64)
    begins[axes], ends[axes] = pads[: len(axes)], pads[len(axes) :]
    if np.any(begins[:2]) or np.any(ends[:2]) or np.any(begins < 0) or np.any(ends < 0):
        return "it pads other axes than the spatial ones, or crops"
    one = (1,) * (rank - 2)
    total = tuple(int(b + e) for b, e in zip(begins[2:], ends[2:], strict=True))
    window = Window(one, one, one, tuple(int(b) for b in begins[2:]), total)

    def compute() -> Arrays:
        return np.ones((channels, 1, *one)), np.zeros(channels)

    return (Part(operand, 1, AffineMap(channels, channels, channels, window, True, compute)),)


def _arithmetic(node: ir.Node, axis: int) -> Sequence[Part] | str:
    channels = outputs_of(node, axis)
    operands = [v for v in node.inputs if v is not None]
    if channels is None or len(operands) != len(node.inputs):
        return f"the channels of {node.op_type} are not known"
    if is_op(node, "Neg"):
        return (Part(operands[0], axis, scaling(-np.ones(1), None, channels)),)
    for operand in operands if len(operands) == 2 else ():
        if channels_of(operand, axis) != channels or rank_of(operand) != rank_of(node.outputs[0]):
            continue
        found = affine_of(node, operand, axis, channels)
        if found is not None:
            return (Part(operand, axis, scaling(found.a, found.c, channels)),)
    if not is_op(node, "Add", "Sub", "Sum"):
        return QUIET_REASON
    shapes = {shape_of(v) for v in operands}
    if len(shapes) != 1 or any(shape is None or None in shape for shape in shapes):
        return QUIET_REASON
    signs = [1.0, *([-1.0] if is_op(node, "Sub") else [1.0] * (len(operands) - 1))]
    return tuple(
        Part(v, axis, identity(channels) if sign > 0 else scaling(-np.ones(1), None, channels))
        for v, sign in zip(operands, signs, strict=True)
    )


def _window(node: ir.Node, kernel: tuple[int, ...], *, transposed: bool) -> Window | str:
    rank = len(kernel)
    strides = tuple(attribute(node, "strides", None) or (1,) * rank)
    dilations = tuple(attribute(node, "dilations", None) or (1,) * rank)
    pads = list(attribute(node, "pads", None) or (0,) * (2 * rank))
    auto_pad = str(attribute(node, "auto_pad", "NOTSET"))
    if auto_pad == "VALID":
        pads = [0] * (2 * rank)
    elif auto_pad not in ("NOTSET", ""):
        sizes = (shape_of(node.inputs[0]) or ())[2:]
        same = _same_pads(sizes, kernel, strides, dilations, upper=auto_pad == "SAME_UPPER") if not transposed else None
        if same is None:
            return f"{display_name(node)} leaves its padding to the runtime ({auto_pad})"
        pads = same
    if any(p < 0 for p in pads) or rank == 0:
        return f"{display_name(node)} crops its operand"
    begins, ends = tuple(pads[:rank]), tuple(pads[rank:])
    reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    if not transposed:
        slack = tuple(b + e - r for b, e, r in zip(begins, ends, reach, strict=True))
        return Window(tuple(kernel), strides, dilations, begins, slack)
    if attribute(node, "output_shape", None):
        return f"{display_name(node)} derives its padding from a given output shape"
    extra = tuple(attribute(node, "output_padding", None) or (0,) * rank)
    slack = tuple(r + x - b - e for b, e, r, x in zip(begins, ends, reach, extra, strict=True))
    return Window(tuple(kernel), strides, dilations, begins, slack)


def _same_pads(
    sizes: Sequence[int | str | None],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    *,
    upper: bool,
) -> list[int] | None:
    """Padding of SAME_UPPER and SAME_LOWER, begins then ends, where the sizes are static."""
    begins, ends = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=False):
        if not isinstance(size, int):
            return None
        total = max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    return [*begins, *ends] if len(begins) == len(kernel) else None


def _wide(value: ir.Value | None) -> Array:
    array = evaluate(value)
    if array is None:
        raise ValueError("a weight that was constant has gone")
    wide: Array = array.astype(np.float64)
    return wide


def _name(value: ir.Value | None) -> str:
    return value.name if value is not None and value.name else "weight"

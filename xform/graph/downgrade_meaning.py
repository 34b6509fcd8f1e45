"""Downward adapters for operators whose meaning changed. Reverse of `upgrade_meaning`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from xform.graph.downgrade_inputs import known_input
from xform.graph.downgrade_steps import Unavailable, lower
from xform.graph.opset_emit import Emitter, get_input, set_attribute, set_input
from xform.graph.values import attribute, constant, rank_of, shape_of


@lower(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax_13(node: ir.Node, emit: Emitter) -> Sequence[ir.Value] | None:
    """Older versions normalize all dims from `axis` on together, so `axis` has to be the last dim."""
    x = node.inputs[0]
    rank, axis = rank_of(x), attribute(node, "axis", -1)
    if rank is None:
        if axis != -1:
            raise Unavailable("the rank of its input is unknown, and older versions normalize the last dims together")
        set_attribute(node, "axis", -1)
        return None
    axis %= max(rank, 1)
    if axis == rank - 1 or rank == 0:
        set_attribute(node, "axis", axis)
        return None
    shape = shape_of(x) or ()
    if all(d == 1 for d in shape[axis + 1 :]):
        set_attribute(node, "axis", axis)
        return None
    perm = [i for i in range(rank) if i != axis] + [axis]
    turned = emit.op(node.op_type, emit.op("Transpose", x, perm=perm), axis=rank - 1)
    return [emit.op("Transpose", turned, perm=np.argsort(perm).tolist())]


@lower(15, "BatchNormalization")
def _batch_norm_15(node: ir.Node, emit: Emitter) -> None:
    """Scale and bias, mean and variance had the type of the input."""
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    for index, value in enumerate(node.inputs[1:], 1):
        if value is not None and dtype is not None and value.dtype is not None and value.dtype != dtype:
            raise Unavailable(f"input {index} has another type than the input")


@lower(14, "BatchNormalization")
def _batch_norm_14(node: ir.Node, _emit: Emitter) -> None:
    if attribute(node, "training_mode", 0):
        raise Unavailable("training_mode=1 is newer")
    node.attributes.pop("training_mode", None)
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise Unavailable("it has running statistics")
    node.resize_outputs(1)


@lower(18, "Resize")
def _resize_18(node: ir.Node, emit: Emitter) -> None:
    """Factors or sizes of some axes become those of all."""
    axes = attribute(node, "axes")
    if attribute(node, "antialias", 0) or attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unavailable("antialias and keep_aspect_ratio_policy are newer")
    node.attributes.pop("antialias", None)
    node.attributes.pop("keep_aspect_ratio_policy", None)
    node.attributes.pop("axes", None)
    rank = rank_of(node.inputs[0])
    if axes is None or list(axes) == list(range(rank or 0)):
        return
    if rank is None or attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Unavailable("it resizes some axes only")
    places = [a % rank for a in axes]
    if get_input(node, 2) is not None and shape_of(get_input(node, 2)) != (0,):
        scales = np.ones(rank, np.float32)
        scales[places] = known_input(node, 2, "scales")
        set_input(node, 2, emit.constant(scales, "scales"))
        return
    sizes = emit.op("Shape", node.inputs[0])
    order = np.arange(rank)
    order[places] = np.arange(len(places)) + rank
    joined = emit.op("Concat", sizes, get_input(node, 3), axis=0)
    set_input(node, 3, emit.op("Gather", joined, emit.constant(order, "places"), axis=0))


@lower(13, "Resize")
def _resize_13(node: ir.Node, emit: Emitter) -> None:
    """Omitted inputs were empty tensors."""
    for index, name in ((1, "roi"), (2, "scales")):
        if get_input(node, index) is None:
            set_input(node, index, emit.constant(np.zeros(0, np.float32), name))


@lower(19, "Resize")
def _resize_19(node: ir.Node, _emit: Emitter) -> None:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "half_pixel_symmetric":
        raise Unavailable("coordinate_transformation_mode=half_pixel_symmetric is newer")


@lower(11, "Resize")
def _resize_11(node: ir.Node, _emit: Emitter) -> None:
    """Version 10 is asymmetric; nearest samples round down where it enlarges, up where it shrinks."""
    scales = constant(get_input(node, 2))
    if scales is None or scales.size == 0:
        raise Unavailable("its factors are not constants")
    if attribute(node, "coordinate_transformation_mode", "half_pixel") != "asymmetric":
        raise Unavailable("coordinate_transformation_mode other than asymmetric is newer")
    mode = attribute(node, "mode", "nearest")
    nearest = attribute(node, "nearest_mode", "round_prefer_floor")
    fits = np.all(scales >= 1) if nearest == "floor" else nearest == "ceil" and np.all(scales <= 1)
    if mode == "nearest" and not fits:
        raise Unavailable(f"nearest_mode={nearest} is newer")
    if mode == "cubic":
        raise Unavailable("mode=cubic is newer")
    for name in (
        "coordinate_transformation_mode",
        "nearest_mode",
        "cubic_coeff_a",
        "exclude_outside",
        "extrapolation_value",
    ):
        node.attributes.pop(name, None)
    set_input(node, 1, node.inputs[2])
    node.resize_inputs(2)

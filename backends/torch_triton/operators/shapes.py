"""Shapes and layouts."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from xform.backends.torch_triton.functions import layouts, sizes
from xform.backends.torch_triton.lower.site import Ints, Item, Site, Unsupported, axes_of, is_computed
from xform.backends.torch_triton.lower.table import lowers
from xform.backends.torch_triton.operators.arithmetic import item_of
from xform.graph.values import shape_of


def dim(site: Site, index: int, axis: int) -> Item:
    """One dim of an input: a number if static, else read when the graph runs."""
    shape = site.shape(index)
    known = None if shape is None else shape[axis]
    return known if isinstance(known, int) else site.call(torch.Tensor.size, site.tensor(index), axis)


def product(site: Site, items: list[Item]) -> Item:
    """The product of dims."""
    result: Item = 1
    for item in items:
        result = item_of(site, operator.mul, result, item)
    return result


@lowers("Shape")
def shape(site: Site) -> Any:
    rank, start, end = site.rank(), site.attr("start", 0), site.attr("end")
    if rank is None:
        return site.call(sizes.shape_tensor, site.tensor(), start, end)
    return Ints(tuple(dim(site, 0, axis) for axis in range(rank)[slice(start, end)]))


@lowers("Size")
def size(site: Site) -> Any:
    rank = site.rank()
    if rank is None:
        return Ints((site.call(torch.Tensor.numel, site.tensor()),), is_scalar=True)
    return Ints((product(site, [dim(site, 0, axis) for axis in range(rank)]),), is_scalar=True)


@lowers("Reshape")
def reshape(site: Site) -> Any:
    keep_zero = bool(site.attr("allowzero", 0))
    if site.has_ints(0) and site.has_ints(1):  # a size as a vector of one, or back
        shape, held = site.demand_ints(1).known, site.demand_ints(0).items
        if shape == (-1,) or (shape is not None and len(shape) <= 1 and len(held) == math.prod(shape or (1,))):
            return Ints(held, is_scalar=shape == ())
    target = site.ints(1) if _length_known(site, 1) else None
    if target is None:
        return site.call(sizes.reshape, site.tensor(), site.call(torch.Tensor.tolist, site.tensor(1)), keep_zero)
    items = list(target.items)
    static, ambiguous = site.shape(), False
    if target.known is None and not keep_zero and _may_be_zero(items):
        return site.call(sizes.reshape, site.tensor(), Ints(tuple(items)), keep_zero)
    if not keep_zero:
        items = [dim(site, 0, axis) if item == 0 else item for axis, item in enumerate(items)]
    if -1 in items and any(isinstance(item, Node) for item in items):  # of a batch of none, torch infers nothing
        place, result = items.index(-1), shape_of(site.node.outputs[0])
        known = None if result is None else result[place]
        items[place] = known if isinstance(known, int) else -1
        ambiguous = items[place] == -1
    if ambiguous or (static is not None and 0 in static):
        return site.call(sizes.reshape, site.tensor(), Ints(tuple(items)), keep_zero)
    return site.call(torch.Tensor.reshape, site.tensor(), items)


def _may_be_zero(items: list[Item]) -> bool:
    """Whether a computed size may be a 0 that stands for "as it was"; one read from a shape is a size."""
    return any(isinstance(item, Node) and not _is_size(item) for item in items)


def _is_size(item: Any) -> bool:
    if isinstance(item, int):
        return item > 0
    if not isinstance(item, Node):
        return False
    if item.op == "call_method":
        return item.target in ("size", "numel")
    return item.target in (operator.mul, operator.add) and all(_is_size(arg) for arg in item.args)


def _length_known(site: Site, index: int) -> bool:
    found = site.shape(index)
    return site.has_ints(index) or (found is not None and len(found) == 1 and isinstance(found[0], int))


@lowers("Flatten")
def flatten(site: Site) -> Any:
    axis = site.attr("axis", 1)
    rank = site.rank()
    if rank is None:
        return site.call(layouts.flatten, site.tensor(), axis)
    axis = axis + rank if axis < 0 else axis
    if axis == 1 and rank >= 2:
        return site.call(torch.flatten, site.tensor(), 1)
    rows = product(site, [dim(site, 0, i) for i in range(axis)])
    columns = product(site, [dim(site, 0, i) for i in range(axis, rank)])
    return site.call(torch.Tensor.reshape, site.tensor(), [rows, columns])


@lowers("Transpose")
def transpose(site: Site) -> Any:
    order = site.attr("perm")
    if order is None:
        rank = site.demand_rank()
        order = range(rank)[::-1]
    return site.call(torch.permute, site.tensor(), list(order))


@lowers("Squeeze")
def squeeze(site: Site) -> Any:
    if site.has_ints(0) and len(site.demand_ints(0).items) == 1:
        return Ints(site.demand_ints(0).items, is_scalar=True)
    if is_computed(site, 1):
        return site.call(layouts.squeeze, site.tensor(), site.listed(1))
    axes = axes_of(site, 1)
    if axes is None:
        return site.call(torch.squeeze, site.tensor())
    return site.call(torch.squeeze, site.tensor(), tuple(axes))


@lowers("Unsqueeze")
def unsqueeze(site: Site) -> Any:
    if is_computed(site, 1):
        return site.call(layouts.unsqueeze, site.tensor(), site.listed(1))
    axes = axes_of(site, 1)
    if axes is None:
        raise Unsupported("its axes are missing")
    if site.has_ints(0) and site.demand_ints(0).is_scalar and list(axes) in ([0], [-1]):
        return Ints(site.demand_ints(0).items)
    result = site.tensor()
    rank = site.rank()
    if len(axes) > 1 and rank is None:
        raise Unsupported("the rank of its input is unknown")
    ordered = sorted(a + (rank or 0) + len(axes) if a < 0 and len(axes) > 1 else a for a in axes)
    for axis in ordered:
        result = site.call(torch.unsqueeze, result, axis)
    return result


@lowers("Concat")
def concat(site: Site) -> Any:
    indices = range(len(site.node.inputs))
    if site.attr("axis") in (0, -1) and all(site.has_ints(i) for i in indices):
        return Ints(tuple(item for i in indices for item in site.demand_ints(i).items))
    tensors = site.tensors()
    return tensors[0] if len(tensors) == 1 else site.call(torch.cat, tensors, site.attr("axis"))


@lowers("Split")
def split(site: Site) -> Any:
    axis, count = site.attr("axis", 0), len(site.node.outputs)
    given = site.ints(1)
    if given is None:
        size = dim(site, 0, axis)
        if not isinstance(size, int):
            result = site.call(layouts.split_evenly, site.tensor(), count, axis)
            return site.pick(result, count)
        part = -(-size // (site.attr("num_outputs") or count))
        given = Ints(tuple(max(min(part, size - i * part), 0) for i in range(count)))
    result = site.call(torch.split, site.tensor(), given, axis)
    return site.pick(result, count)


@lowers("Expand")
def expand(site: Site) -> Any:
    if not _length_known(site, 1):
        return site.call(sizes.expand, site.tensor(), site.call(torch.Tensor.tolist, site.tensor(1)))
    target = site.demand_ints(1)
    own = site.shape()
    if target.known is not None and own is not None and all(isinstance(d, int) for d in own):
        wanted = np.broadcast_shapes(tuple(int(d) for d in own if isinstance(d, int)), target.known)
        return site.call(torch.Tensor.expand, site.tensor(), list(wanted))
    return site.call(sizes.expand, site.tensor(), target)


@lowers("Tile")
def tile(site: Site) -> Any:
    return site.call(torch.tile, site.tensor(), site.demand_ints(1))


@lowers("ConstantOfShape")
def constant_of_shape(site: Site) -> Any:
    held = site.attr("value")
    array = np.zeros((), np.float32) if held is None else held.numpy().reshape(())
    dtype = ir.DataType.FLOAT if held is None else held.dtype
    number = array.item() if array.dtype.kind in "biuf" else float(array)
    found = site.ints(0) if _length_known(site, 0) else None
    if found is not None and len(found.items) == 1 and dtype is ir.DataType.INT64 and found.known is not None:
        count = found.known[0]
        if count <= 64:
            return Ints((int(number),) * count)
    like = site.like()
    device = {} if like is None else {"device": site.call(getattr, like, "device")}
    return site.call(torch.full, site.listed(0), number, dtype=site.torch_dtype(dtype), **device)


@lowers("Range")
def range_(site: Site) -> Any:
    dtype = site.dtype()
    like = site.like()
    device = {} if like is None else {"device": site.call(getattr, like, "device")}
    if dtype in (ir.DataType.INT64, ir.DataType.INT32):
        arguments: list[Any] = [_int(site, i) for i in range(3)]
        known = [a for a in arguments if isinstance(a, int)]
        if len(known) == 3 and dtype is ir.DataType.INT64 and len(range(*known)) <= 16:
            return Ints(tuple(range(*known)))
    else:
        arguments = [_number(site, i) for i in range(3)]
    return site.call(layouts.arange, *arguments, dtype=site.torch_dtype(dtype or ir.DataType.FLOAT), **device)


def _int(site: Site, index: int) -> Any:
    return (
        site.demand_ints(index).items[0] if site.has_ints(index) else site.call(torch.Tensor.item, site.tensor(index))
    )


def _number(site: Site, index: int) -> Any:
    number = site.number(index)
    return site.call(torch.Tensor.item, site.tensor(index)) if number is None else number


@lowers("Pad")
def pad(site: Site) -> Any:
    mode = site.attr("mode", "constant")
    value: Any = site.operand(2) if site.has(2) else 0
    if not _length_known(site, 1) or is_computed(site, 3):
        return site.call(layouts.pad_computed, site.tensor(), site.listed(1), site.listed(3), mode, value)
    pads = site.demand_ints(1)
    rank = site.rank()
    axes = site.known_ints(3)
    if axes is None:
        axes = list(range(len(pads.items) // 2))
    elif rank is None and any(axis < 0 for axis in axes):
        raise Unsupported("the rank of its input is unknown")
    axes = [axis + (rank or 0) if axis < 0 else axis for axis in axes]
    begins, ends = pads.items[: len(axes)], pads.items[len(axes) :]
    return site.call(layouts.pad, site.tensor(), list(begins), list(ends), axes, mode, value)


@lowers("DepthToSpace")
def depth_to_space(site: Site) -> Any:
    if site.attr("mode", "DCR") == "CRD":
        return site.call(torch.nn.functional.pixel_shuffle, site.tensor(), site.attr("blocksize"))
    return site.call(layouts.depth_to_space, site.tensor(), site.attr("blocksize"))


@lowers("SpaceToDepth")
def space_to_depth(site: Site) -> Any:
    if site.attr("mode", "DCR") == "CRD":
        return site.call(torch.nn.functional.pixel_unshuffle, site.tensor(), site.attr("blocksize"))
    return site.call(layouts.space_to_depth, site.tensor(), site.attr("blocksize"))


@lowers("EyeLike")
def eye_like(site: Site) -> Any:
    wanted = site.attr("dtype")
    dtype = ir.DataType(wanted) if wanted else site.dtype() or ir.DataType.FLOAT
    return site.call(layouts.eye_like, site.tensor(), site.attr("k", 0), site.torch_dtype(dtype))


@lowers("Trilu")
def triangle(site: Site) -> Any:
    function = torch.triu if site.attr("upper", 1) else torch.tril
    return site.call(function, site.tensor(), site.demand_ints(1).items[0] if site.has(1) else 0)


@lowers("Col2Im")
def column_to_image(site: Site) -> Any:
    image, block = site.demand_ints(1), site.demand_ints(2)
    spatial = len(block.items)
    dilations, strides = (list(site.attr(name, [1] * spatial)) for name in ("dilations", "strides"))
    pads = list(site.attr("pads", [0] * 2 * spatial))
    return site.call(layouts.columns_to_image, site.tensor(), image, block, dilations, pads, strides)

"""Reading by index."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from xform.backends.torch_triton.functions import indexing
from xform.backends.torch_triton.lower.site import Ints, Site, Unsupported, is_computed
from xform.backends.torch_triton.lower.table import lowers
from xform.backends.torch_triton.operators.shapes import dim


@lowers("Gather")
def gather(site: Site) -> Any:
    axis = site.attr("axis", 0)
    if site.has_ints(0) and not site.demand_ints(0).is_scalar and site.has_ints(1):
        wanted, items = site.demand_ints(1), site.demand_ints(0).items
        if wanted.known is not None and all(-len(items) <= i < len(items) for i in wanted.known):
            return Ints(tuple(items[i] for i in wanted.known), wanted.is_scalar)
    if site.has_ints(1):
        places = site.demand_ints(1)
        if places.is_scalar:
            return site.call(torch.select, site.tensor(), axis, places.items[0])
        known = places.known
        if known and len(known) > 1 and _consecutive(known):
            return site.call(torch.narrow, site.tensor(), axis, known[0], len(known))
    index_rank = site.rank(1)
    known_array = site.known(1)
    positive = known_array is not None and (known_array.size == 0 or int(known_array.min()) >= 0)
    if axis == 0 and site.rank(0) == 2 and index_rank is not None and index_rank > 0 and _is_table(site):
        return site.call(torch.nn.functional.embedding, indices(site, 1, positive), site.tensor())
    if index_rank == 1:
        return site.call(torch.index_select, site.tensor(), axis, indices(site, 1, positive, axis))
    return site.call(indexing.gather, site.tensor(), site.tensor(1), axis)


def _is_table(site: Site) -> bool:
    """Embedding tables are read by token ids, which are never negative as long as nobody says otherwise."""
    value = site.value(0)
    return value is not None and value.const_value is not None and site.is_float(0)


def _consecutive(places: tuple[int, ...]) -> bool:
    return places[0] >= 0 and list(places) == list(range(places[0], places[0] + len(places)))


def indices(site: Site, index: int, positive: bool, axis: int = 0) -> Any:
    """An index input with negative places counted from the end."""
    places = site.tensor(index)
    if positive:
        return places
    return site.call(indexing.from_the_front, places, dim(site, 0, axis))


@lowers("GatherElements")
def gather_elements(site: Site) -> Any:
    return site.call(indexing.gather_elements, site.tensor(), site.tensor(1), site.attr("axis", 0))


@lowers("GatherND")
def gather_nd(site: Site) -> Any:
    return site.call(indexing.gather_nd, site.tensor(), site.tensor(1), site.attr("batch_dims", 0))


@lowers("Slice")
def slice_(site: Site) -> Any:
    if not _has_length(site, 1) or is_computed(site, 3) or is_computed(site, 4):
        return site.call(indexing.slice_computed, site.tensor(), *(site.listed(i) for i in range(1, 5)))
    starts, ends, axes, steps = (site.ints(i) for i in range(1, 5))
    if starts is None or ends is None:
        raise Unsupported("its bounds are missing")
    count = len(starts.items)
    places = list(range(count)) if axes is None else site.known_ints(3)
    strides = [1] * count if steps is None else site.known_ints(4)
    assert places is not None and strides is not None
    if site.has_ints(0) and not site.demand_ints(0).is_scalar and starts.known and ends.known:
        return Ints(site.demand_ints(0).items[slice(starts.known[0], _bound(ends.known[0], strides[0]), strides[0])])
    result = site.tensor()
    for axis, start, end, step in zip(places, starts.items, ends.items, strides, strict=True):
        if step == 1:
            if start == 0 and end == 2**63 - 1:
                continue
            stop = None if isinstance(end, int) and end >= 2**31 - 1 else end
            result = site.call(indexing.slice_axis, result, axis, start, stop)
        else:
            result = site.call(indexing.slice_with_step, result, axis, start, end, step)
    return result


def _has_length(site: Site, index: int) -> bool:
    shape = site.shape(index)
    return site.has_ints(index) or (shape is not None and len(shape) == 1 and isinstance(shape[0], int))


def _bound(end: int, step: int) -> int | None:
    """ONNX writes "to the very beginning" as a number below every place."""
    return None if step < 0 and end <= -(2**31) else end


@lowers("OneHot")
def one_hot(site: Site) -> Any:
    depth = site.ints(1) if not site.is_float(1) else None
    count = depth.items[0] if depth is not None else site.call(int, site.call(torch.Tensor.item, site.tensor(1)))
    return site.call(indexing.one_hot, site.tensor(0), count, site.tensor(2), site.attr("axis", -1))


@lowers("NonZero")
def non_zero(site: Site) -> Any:
    return site.call(indexing.non_zero, site.tensor())


@lowers("Compress")
def compress(site: Site) -> Any:
    return site.call(indexing.compress, site.tensor(), site.tensor(1), site.attr("axis"))


@lowers("ReverseSequence")
def reverse_sequence(site: Site) -> Any:
    axes = site.attr("batch_axis", 1), site.attr("time_axis", 0)
    return site.call(indexing.reverse_sequence, site.tensor(), site.tensor(1), *axes)


@lowers("Unique")
def unique(site: Site) -> Any:
    result = site.call(indexing.unique, site.tensor(), site.attr("axis"), bool(site.attr("sorted", 1)))
    return site.pick(result, len(site.node.outputs))


@lowers("ArrayFeatureExtractor", domain="ai.onnx.ml")
def array_feature_extractor(site: Site) -> Any:
    return site.call(indexing.extract_features, site.tensor(), site.tensor(1))


@lowers("Binarizer", domain="ai.onnx.ml")
def binarizer(site: Site) -> Any:
    above = site.call(torch.gt, site.tensor(), site.attr("threshold", 0.0))
    return site.call(torch.Tensor.to, above, site.torch_dtype(site.dtype() or ir.DataType.FLOAT))

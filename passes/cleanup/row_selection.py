"""Which indices of one axis a Gather or Slice by constants keeps, and what that is on the other side of a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, Dim, attribute, constant, is_op, same_dim, same_size, shape_of
from xform.passes.cleanup.local import given, integers
from xform.rewrite.builder import Builder

_FOLDED = 1 << 22  # elements of a constant whose rows are taken at once
_END = np.iinfo(np.int32).max  # exporters write the end of any axis as this or the largest int64


@dataclass(frozen=True)
class Selection:
    """Which indices of one axis a node keeps, in their order.

    Attributes:
        axis: Of the operand, counted from the front.
        kept: Indices, negative ones from the end; or start, end and step.
        sliced: Whether it is by start, end and step.
    """

    axis: int
    kept: tuple[int, ...]
    sliced: bool

    def count(self, size: Dim) -> int | None:
        """How many indices are kept of an axis of that size; None where that is unknown."""
        if not self.sliced:
            return len(self.kept)
        return len(range(size)[slice(*self.kept)]) if isinstance(size, int) else None

    def most(self, size: Dim) -> int | None:
        """A bound of `count`; None where there is none."""
        start, end, step = self.kept if self.sliced else (0, 0, 1)
        counted = self.count(size)
        if counted is None and step == 1 and (start >= 0) == (end >= 0):
            return max(end - start, 0)
        return 1 if counted is None and step == 1 and start == -1 else counted

    def is_last(self, size: Dim) -> bool:
        """Whether it keeps the last index, and nothing else."""
        if isinstance(size, int):
            return bool(self.take(np.arange(size), 0).tolist() == [size - 1])
        return (self.kept[0] == -1 and self.kept[1] >= _END) if self.sliced else self.kept == (-1,)

    def take(self, array: Array, axis: int) -> Array:
        """Of an array, along another axis."""
        if not self.sliced:
            return np.take(array, self.kept, axis)
        index: list[slice] = [slice(None)] * array.ndim
        index[axis] = slice(*self.kept)
        return array[tuple(index)]

    def of(self, value: ir.Value, axis: int, build: Builder) -> ir.Value:
        """Of a value, along another axis; of a constant at once."""
        array = constant(value, max_elements=_FOLDED)
        if array is not None:
            return build.constant(np.ascontiguousarray(self.take(array, axis)), value.name or "constant")
        if not self.sliced:
            return build.op("Gather", value, np.array(self.kept, np.int64), axis=axis)
        start, end, step = self.kept
        return build.op("Slice", value, [start], [end], [axis], [step])


def selection_of(node: ir.Node) -> Selection | None:
    """What a Gather or Slice by constants keeps of one axis; counted from the front where its size is known."""
    shape = shape_of(node.inputs[0]) if is_op(node, "Gather", "Slice") else None
    if not shape:
        return None
    found = _gathered(node, len(shape)) if is_op(node, "Gather") else _sliced(node, len(shape))
    size = None if found is None else shape[found.axis]
    if found is None or not isinstance(size, int):
        return found
    if found.sliced:
        start, end, step = slice(*found.kept).indices(size)
        single = len(range(start, end, step)) == 1  # said as a Gather says it, so that both are one selection
        return Selection(found.axis, (start,), sliced=False) if single else replace(found, kept=(start, end, step))
    inside = all(-size <= index < size for index in found.kept)
    return replace(found, kept=tuple(index % size for index in found.kept)) if inside else None


def drops_axis(node: ir.Node) -> bool:
    """Whether a node that `selection_of` reads is a Gather by one index of rank 0, whose result has an axis less."""
    which = constant(given(node, 1)) if is_op(node, "Gather") else None
    return which is not None and which.ndim == 0


def _gathered(node: ir.Node, rank: int) -> Selection | None:
    which = given(node, 1)
    kept, array = integers(which), constant(which)
    if not kept or array is None or array.ndim > 1:
        return None
    return Selection(attribute(node, "axis", 0) % rank, tuple(kept), sliced=False)


def _sliced(node: ir.Node, rank: int) -> Selection | None:
    starts, ends = integers(given(node, 1)), integers(given(node, 2))
    axes = [0] if given(node, 3) is None else integers(given(node, 3))
    steps = [1] if given(node, 4) is None else integers(given(node, 4))
    if not starts or not ends or not axes or not steps or len(starts) != 1 or steps[0] < 1:
        return None
    return Selection(axes[0] % rank, (starts[0], ends[0], steps[0]), sliced=True)


def through_view(before: Sequence[Dim], after: Sequence[Dim], selection: Selection) -> Selection | None:
    """What a selection of a view's result, of shape `after`, keeps of its operand, of shape `before`.

    An axis that stays keeps its selection; one that is merged with others, or split off, can keep an index of the inner
    axis as a stride of the merged one, and an index of the outer axis as a block of it. None for anything else.
    """
    (first, end), (first_after, end_after) = _tied(before, after, selection.axis)
    if end - first == 1 == end_after - first_after:
        same = same_dim(before[first], after[selection.axis])
        return replace(selection, axis=first) if same else None
    index = _index_in(after[first_after:end_after], selection.axis - first_after, selection)
    return None if index is None else _selection_in(before[first:end], first, index)


def _tied(before: Sequence[Dim], after: Sequence[Dim], axis: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The fewest axes before and after a view, `axis` of the latter among them, that have the same elements."""
    starts = [
        (i, j) for j in range(axis, -1, -1) for i in range(len(before), -1, -1) if same_size(before[:i], after[:j])
    ]
    ends = [
        (i, j)
        for j in range(axis + 1, len(after) + 1)
        for i in range(starts[0][0] + 1, len(before) + 1)
        if same_size(before[i:], after[j:])
    ]
    return ((starts[0][0], ends[0][0]), (starts[0][1], ends[0][1])) if ends else ((0, len(before)), (0, len(after)))


@dataclass(frozen=True)
class _Index:
    """One index of an axis of `size`, with `outer` elements before it and `inner` behind it in a block of axes."""

    outer: int
    size: int
    inner: int
    index: int


def _index_in(dims: Sequence[Dim], axis: int, selection: Selection) -> _Index | None:
    """What a selection along one of `dims` is; a block or a stride of a single axis is an index of an axis in it."""
    sizes = [dim for dim in dims if isinstance(dim, int)]
    if len(sizes) < len(dims):
        return None
    size = sizes[axis]
    kept = selection.take(np.arange(size), 0).tolist()
    if len(kept) == 1:
        return _Index(prod(sizes[:axis]), size, prod(sizes[axis + 1 :]), kept[0])
    step = selection.kept[2] if selection.sliced else 0
    if len(sizes) > 1 or not kept:
        return None
    if step == 1 and size % len(kept) == 0 and kept[0] % len(kept) == 0:
        return _Index(1, size // len(kept), len(kept), kept[0] // len(kept))
    if step > 1 and kept[0] < step and len(kept) * step == size:
        return _Index(len(kept), step, 1, kept[0])
    return None


def _selection_in(dims: Sequence[Dim], first: int, index: _Index) -> Selection | None:
    """The same along one of `dims`, which begin at axis `first`."""
    sizes = [dim for dim in dims if isinstance(dim, int)]
    if len(sizes) < len(dims):
        return None
    for axis, size in enumerate(sizes):
        if (prod(sizes[:axis]), size, prod(sizes[axis + 1 :])) == (index.outer, index.size, index.inner):
            return Selection(first + axis, (index.index,), sliced=False)
    if len(sizes) == 1 and index.outer == 1:
        return Selection(first, (index.index * index.inner, (index.index + 1) * index.inner, 1), sliced=True)
    if len(sizes) == 1 and index.inner == 1:
        return Selection(first, (index.index, sizes[0], index.size), sliced=True)
    return None

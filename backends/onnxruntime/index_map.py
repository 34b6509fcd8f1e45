"""Where the elements of a value come from, through operators that only move them.

A chain of views, transposes, slices, splits and concatenations of one tensor is a map of indices: element i of the
result is element map[i] of the source. Maps are found by running the chain on numbers that say where they stand. As
runtimes copy runs of elements, a map is kept in units: runs of so many elements along the last axis, in the same order
on both sides. What would tear runs apart (a transpose of the last axis, a slice with a step) ends a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, constant, is_op, shape_of

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_LARGEST = 1 << 24  # units of a value that is followed
_DEEPEST = 64  # operators of a chain


@dataclass(frozen=True)
class Chain:
    """The moves between a value and the one that its elements come from.

    Attributes:
        source: Made by something else, or an input.
        nodes: The moves, each after those that it reads.
        unit: Elements of a run, a divisor of the last axis of everything on the way.
    """

    source: ir.Value
    nodes: tuple[ir.Node, ...]
    unit: int


@dataclass(frozen=True)
class Rows:
    """A map as a choice of rows: `value = source.reshape(batch, -1, width)[:, indices].reshape(shape)`.

    Attributes:
        batch: Leading parts of the source that are treated alike, each with its rows.
        indices: int64 [rows per part of the value].
        width: Elements of a row.
        identity: Whether nothing moves, so that a view is enough.
    """

    batch: int
    indices: Array
    width: int
    identity: bool


def sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value that has only known and no empty axes, and at least one; else None."""
    shape = shape_of(value)
    if not shape:
        return None
    known = tuple(size for size in shape if isinstance(size, int) and size > 0)
    return known if len(known) == len(shape) else None


def is_move(node: ir.Node | None) -> bool:
    """Whether a node only moves runs of elements, with all sizes known."""
    if node is None or any(sizes(output) is None for output in node.outputs):
        return False
    if is_op(node, *_VIEWS):
        return sizes(node.inputs[0]) is not None
    if is_op(node, "Transpose"):
        perm, shape = attribute(node, "perm"), sizes(node.inputs[0])
        return shape is not None and perm is not None and perm[-1] == len(shape) - 1
    if is_op(node, "Slice"):
        return _slices(node) is not None
    if is_op(node, "Split", "Concat"):
        return all(sizes(value) is not None for value in operands(node))
    return False


def operands(node: ir.Node) -> list[ir.Value]:
    """The operands of a move whose elements it moves."""
    return [v for v in (node.inputs if is_op(node, "Concat") else node.inputs[:1]) if v is not None]


def copied(node: ir.Node) -> int:
    """Elements that a move copies: none for a view, or for a transpose that only moves axes of one."""
    first = node.inputs[0]
    if is_op(node, *_VIEWS):
        return 0
    if is_op(node, "Transpose"):
        shape = sizes(first) or ()
        order = [axis for axis in attribute(node, "perm") if shape[axis] != 1]
        if order == sorted(order):
            return 0
    return sum(prod(sizes(output) or ()) for output in node.outputs if output.uses() or output.is_graph_output())


def chain(value: ir.Value) -> Chain | None:
    """The moves behind `value`; None where there are none, or they start at several values."""
    nodes: list[ir.Node] = []
    sources: list[ir.Value] = []

    def visit(found: ir.Value) -> None:
        node = found.producer()
        if node is None or not is_move(node) or len(nodes) > _DEEPEST:
            if all(found is not known for known in sources):
                sources.append(found)
        elif all(node is not known for known in nodes):
            for operand in operands(node):
                visit(operand)
            nodes.append(node)

    visit(value)
    if not nodes or len(sources) != 1 or sizes(sources[0]) is None:
        return None
    unit = 0
    for one in (sources[0], *(output for node in nodes for output in node.outputs)):
        unit = gcd(unit, (sizes(one) or (1,))[-1])
    for node in nodes:
        if is_op(node, "Slice"):
            shape = sizes(node.inputs[0]) or ()
            taken = (_slices(node) or {}).get(len(shape) - 1)
            unit = unit if taken is None else gcd(unit, int(taken[0]))
    return Chain(sources[0], tuple(nodes), unit)


def index_map(value: ir.Value, found: Chain) -> Array | None:
    """For every unit of `value`, which of the source it is: int64, the shape of `value` with the last axis in units."""
    known: dict[ir.Value, Array] = {}

    def shape(of: ir.Value) -> tuple[int, ...]:
        whole = sizes(of) or ()
        return (*whole[:-1], whole[-1] // found.unit)

    if max(prod(shape(v)) for v in (found.source, value)) > _LARGEST:
        return None
    known[found.source] = np.arange(prod(shape(found.source)), dtype=np.int64).reshape(shape(found.source))
    for node in found.nodes:
        given = [known[operand] for operand in operands(node)]
        if is_op(node, *_VIEWS):
            results = [given[0].reshape(shape(node.outputs[0]))]
        elif is_op(node, "Transpose"):
            results = [given[0].transpose(attribute(node, "perm")).reshape(shape(node.outputs[0]))]
        elif is_op(node, "Concat"):
            results = [np.concatenate(given, axis=attribute(node, "axis"))]
        elif is_op(node, "Slice"):
            results = [_sliced(node, given[0], found.unit)]
        else:
            results = _parts(node, given[0], [shape(output) for output in node.outputs])
        known.update(zip(node.outputs, results, strict=True))
    return known[value]


def _parts(node: ir.Node, operand: Array, shapes: list[tuple[int, ...]]) -> list[Array]:
    axis = attribute(node, "axis", 0) % operand.ndim
    ends = np.cumsum([shape[axis] for shape in shapes])
    return np.split(operand, ends[:-1], axis=axis)


def _slices(node: ir.Node) -> dict[int, Array] | None:
    """What a Slice with constant bounds takes, by axis; None where they are computed, or skip along the last axis."""
    shape = sizes(node.inputs[0])
    starts, ends, axes, steps = ([*(_integers(v) for v in node.inputs[1:]), None, None])[:4]
    if shape is None or starts is None or ends is None:
        return None
    given = [value is not None for value in node.inputs[3:5]]
    if (any(given[:1]) and axes is None) or (any(given[1:]) and steps is None):
        return None
    axes = [axis % len(shape) for axis in axes or range(len(starts))]
    taken = {}
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        if axis == len(shape) - 1 and step != 1:
            return None
        taken[axis] = np.arange(*slice(start, end, step).indices(shape[axis]))
    return taken


def _integers(value: ir.Value | None) -> list[int] | None:
    array = constant(value, max_elements=16)
    return None if array is None else [int(x) for x in array.reshape(-1)]


def _sliced(node: ir.Node, operand: Array, unit: int) -> Array:
    for axis, taken in (_slices(node) or {}).items():
        last = axis == operand.ndim - 1
        operand = operand.take(taken[::unit] // unit if last else taken, axis)
    return operand


def rows_of(found: Array, units: int, unit: int) -> Rows:
    """A map in the widest rows and the most parts that are treated alike.

    Args:
        found: Map, in units of `unit` elements.
        units: Of the source.
    """
    flat = found.reshape(-1)
    breaks = np.flatnonzero(np.diff(flat) != 1) + 1
    run = gcd(len(flat), units)
    if len(breaks):
        run = gcd(run, int(np.gcd.reduce(breaks)))
    run = gcd(run, int(np.gcd.reduce(flat[np.concatenate([[0], breaks])])))
    chosen = flat[::run] // run
    total = units // run
    identity = len(chosen) == total and len(breaks) == 0
    batch = _batch(chosen, total)
    return Rows(batch, chosen[: len(chosen) // batch], run * unit, identity)


def _batch(chosen: Array, total: int) -> int:
    """The most equal parts of `total` rows, from the first of which the first part of `chosen` comes, and so on."""
    most = gcd(len(chosen), total)
    for parts in range(most, 1, -1):
        if most % parts:
            continue
        split = chosen.reshape(parts, -1)
        offsets = np.arange(parts, dtype=np.int64)[:, None] * (total // parts)
        if split[0].max() < total // parts and np.array_equal(split, split[0] + offsets):
            return parts
    return 1

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
_LARGEST = 1 << 21  # units of a value that is followed
_MOST = 256  # moves that are looked at for one value


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
    """The moves that make `value` from another one; None where there are none, or too many."""
    order = _moves_before(value)
    origins: dict[ir.Value, ir.Value] = {}
    for node in order:
        found = {origins.get(operand, operand) for operand in operands(node)}
        for output in node.outputs:  # what joins several values is a source itself
            origins[output] = next(iter(found)) if len(found) == 1 else output
    source = origins.get(value, value)
    needed = {value}
    nodes: list[ir.Node] = []
    for node in reversed(order):
        if source not in (value, *node.outputs) and not needed.isdisjoint(node.outputs):
            nodes.insert(0, node)
            needed.update(operands(node))
    if not nodes or sizes(source) is None:
        return None
    unit = gcd(*((sizes(one) or (1,))[-1] for one in (source, *(output for node in nodes for output in node.outputs))))
    for node in nodes:
        taken = _slices(node) if is_op(node, "Slice") else None
        last = (taken or {}).get(len(sizes(node.inputs[0]) or ()) - 1)
        unit = unit if last is None else gcd(unit, int(last[0]))
    return Chain(source, tuple(nodes), unit)


def _moves_before(value: ir.Value) -> list[ir.Node]:
    """The moves that `value` depends on through moves alone, each after those that it reads; none if too many."""
    order: dict[ir.Node, None] = {}
    stack = [value]
    while stack:
        if len(order) + len(stack) > _MOST:
            return []
        node = stack[-1].producer()
        if node is None or node in order or not is_move(node):
            stack.pop()
            continue
        waiting = [
            v for v in operands(node) if (made := v.producer()) is not None and made not in order and is_move(made)
        ]
        if not waiting:
            order[node] = None
        stack.extend(waiting)
    return list(order)


def index_map(value: ir.Value, found: Chain) -> Array | None:
    """For every unit of `value`, which of the source it is: int64, the shape of `value` with the last axis in units.

    None where a value is too large, or an operator does not give the shape that is declared.
    """

    def shape(of: ir.Value) -> tuple[int, ...]:
        whole = sizes(of) or ()
        return (*whole[:-1], whole[-1] // found.unit)

    values = [found.source, *(output for node in found.nodes for output in node.outputs)]
    if max(prod(shape(v)) for v in values) > _LARGEST:
        return None
    known = {found.source: np.arange(prod(shape(found.source)), dtype=np.int64).reshape(shape(found.source))}
    for node in found.nodes:
        shapes = [shape(output) for output in node.outputs]
        results = _run(node, [known[operand] for operand in operands(node)], shapes, found.unit)
        if [result.shape for result in results] != shapes:
            return None
        known.update(zip(node.outputs, results, strict=True))
    return known[value]


def _run(node: ir.Node, given: list[Array], shapes: list[tuple[int, ...]], unit: int) -> list[Array]:
    """A move on maps, whose last axis is in units."""
    if is_op(node, *_VIEWS):
        return [given[0].reshape(shapes[0])] if prod(shapes[0]) == given[0].size else []
    if is_op(node, "Transpose"):
        return [given[0].transpose(attribute(node, "perm"))]
    if is_op(node, "Concat"):
        return [np.concatenate(given, axis=attribute(node, "axis"))]
    if is_op(node, "Slice"):
        for axis, taken in (_slices(node) or {}).items():
            given[0] = given[0].take(taken[::unit] // unit if axis == given[0].ndim - 1 else taken, axis)
        return given
    axis = attribute(node, "axis", 0) % given[0].ndim
    ends = np.cumsum([shape[axis] for shape in shapes])
    return np.split(given[0], ends[:-1], axis=axis)


def _slices(node: ir.Node) -> dict[int, Array] | None:
    """What a Slice with constant bounds takes, by axis; None where they are computed, or skip along the last axis."""
    shape = sizes(node.inputs[0])
    given = [*node.inputs[1:5], None, None, None, None][:4]
    starts, ends, axes, steps = (_integers(value) for value in given)
    computed = any(value is not None and found is None for value, found in zip(given[2:], (axes, steps), strict=True))
    if shape is None or starts is None or ends is None or computed:
        return None
    axes = list(range(len(starts))) if axes is None else [axis % len(shape) for axis in axes]
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        return None
    taken = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if axis == len(shape) - 1 and step != 1:
            return None
        taken[axis] = np.arange(*slice(start, end, step).indices(shape[axis]))
    return taken


def _integers(value: ir.Value | None) -> list[int] | None:
    array = constant(value, max_elements=16)
    return None if array is None else [int(x) for x in array.reshape(-1)]


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
        split, step = chosen.reshape(parts, -1), total // parts
        starts = np.arange(parts, dtype=np.int64) * step
        likely = split[0].max() < step and np.array_equal(split[:, 0], split[0, 0] + starts)  # which is cheap to see
        if likely and np.array_equal(split, split[0] + starts[:, None]):
            return parts
    return 1

"""Chains of moves as one Gather each, and moves of rows past what works row by row.

Attention in windows (Swin) rolls an image, cuts it into windows, projects it, splits heads, and takes all that back: a
dozen copies around two products, and ONNX Runtime makes each of them. Yet all moves between two computations are one
choice of rows (`index_map`), which a single Gather makes.

    Gather(x viewed as [parts, rows, elements], indices, axis=1)        indices over the rows of a part

Two steps
1. A move of rows [.., C] before or after operators that treat every row alike (`row_region`) is done on their other
   side, where it joins the moves there: cutting windows joins splitting heads. Dynamic quantization sees the same
   numbers in another order, so its scale is the same.
2. The moves of one source become one Gather for each result that something computes with, or a Reshape where the order
   stays.

Either happens where fewer elements are copied after it than before, and rows have at least `_ROW` bytes, the fewest
that were measured (docs/onnxruntime-notes.md). All sizes have to be known. A Transpose of the last axis ends a chain:
products read their operands by columns as well as by rows, so before them it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import onnx_ir as ir

from xform.backends.onnxruntime.emit import Emitter, Site
from xform.backends.onnxruntime.index_map import Rows, chain, copied, index_map, is_move, operands, rows_of, sizes
from xform.backends.onnxruntime.row_region import Region, region_from
from xform.graph.values import Array

_ROW = 128  # bytes
_MOST = 1 << 20  # indices, 8 MB of them
_BYTES = {
    ir.DataType.FLOAT: 4, ir.DataType.FLOAT16: 2, ir.DataType.BFLOAT16: 2, ir.DataType.DOUBLE: 8, ir.DataType.BOOL: 1,
    ir.DataType.INT8: 1, ir.DataType.UINT8: 1, ir.DataType.INT32: 4, ir.DataType.INT64: 8,
}  # fmt: skip


def gather_moves(emitter: Emitter) -> None:
    """Both steps, on the main graph."""
    graph = emitter.model.graph
    for step in (_pass_region, _gather):
        for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
            producer = value.producer()
            if producer is None or producer.graph is graph:
                step(emitter, value)


@dataclass(frozen=True)
class _Moved:
    """A value as a choice of rows of another one.

    Attributes:
        value: What something computes with.
        source: Where its elements come from.
        index: By units, see `index_map`.
        unit: Elements of one.
        moves: What is in between.
    """

    value: ir.Value
    source: ir.Value
    index: Array
    unit: int
    moves: tuple[ir.Node, ...]

    @cached_property
    def rows(self) -> Rows:
        return rows_of(self.index, prod(sizes(self.source) or ()) // self.unit, self.unit)

    @property
    def cost(self) -> int:
        """Elements that the Gather copies."""
        return 0 if self.rows.identity else self.index.size * self.unit

    @property
    def pays(self) -> bool:
        """Whether nothing moves, or a Gather does it well: a type that it knows, rows wide enough and not too many."""
        size = _BYTES.get(self.value.dtype, 0) if self.value.dtype is not None else 0
        return self.rows.identity or (self.rows.width * size >= _ROW and len(self.rows.indices) <= _MOST)

    def order(self) -> Array | None:
        """Which row of the source each row of the value is, where the rows are the same in another order."""
        source, shape = sizes(self.source) or (), sizes(self.value) or ()
        if source[-1:] != shape[-1:] or prod(source) != prod(shape):
            return None
        per_row = shape[-1] // self.unit
        index = self.index.reshape(-1, per_row)
        order = index[:, 0] // per_row
        whole = np.array_equal(index, order[:, None] * per_row + np.arange(per_row))
        return order if whole and np.array_equal(np.sort(order), np.arange(len(order))) else None


def _moved(value: ir.Value) -> _Moved | None:
    """`value` with the moves that make it; None where there are none."""
    found = chain(value)
    index = index_map(value, found) if found is not None else None
    return None if found is None or index is None else _Moved(value, found.source, index, found.unit, found.nodes)


@dataclass(frozen=True)
class _After:
    """The moves of one source alone.

    Attributes:
        nodes: In order.
        results: What they give to anything else.
        alone: Whether nothing else reads the source.
    """

    nodes: tuple[ir.Node, ...]
    results: tuple[ir.Value, ...]
    alone: bool


def _after(source: ir.Value) -> _After:
    reached = {source}
    nodes: dict[ir.Node, None] = {}
    queue = [source]
    while queue:
        for node, _ in queue.pop(0).uses():
            new = node not in nodes and node.graph is source.graph
            if new and is_move(node) and reached.issuperset(operands(node)):
                nodes[node] = None
                reached.update(node.outputs)
                queue.extend(node.outputs)
    outputs = [output for node in nodes for output in node.outputs]
    results = [v for v in outputs if v.is_graph_output() or any(user not in nodes for user, _ in v.uses())]
    alone = not source.is_graph_output() and all(user in nodes for user, _ in source.uses())
    return _After(tuple(nodes), tuple(results), alone)


def _gather(emitter: Emitter, source: ir.Value) -> None:
    """Step 2 for the moves of one source."""
    after = _after(source)
    before = sum(map(copied, after.nodes))
    if not before or chain(source) is not None:  # then they are moves of what `source` is made from
        return
    found = [moved for result in after.results if (moved := _moved(result)) is not None]
    if len(found) < len(after.results):
        return
    wide = [moved for moved in found if moved.pays]
    converted = {moved.value for moved in wide}
    left = {node for moved in found if moved.value not in converted for node in moved.moves}
    if sum(moved.cost for moved in wide) + sum(map(copied, left)) >= before:
        return
    for moved in wide:
        _replace(emitter, moved)
    _sweep(after.nodes)


def _pass_region(emitter: Emitter, entry: ir.Value) -> None:
    """Step 1 for what reads `entry`, the result of moves."""
    producer = entry.producer()
    region = region_from(entry) if producer is not None and is_move(producer) else None
    moved = _moved(entry) if region is not None else None
    if producer is None or moved is None or region is None or not _vanishes(moved, region):
        return
    after = [_after(value) for value in region.exits]
    ends = [end for one in after for result in one.results if (end := _moved(result)) is not None]
    if not all(one.alone for one in after) or len(ends) < sum(len(one.results) for one in after):
        return
    before = _least(moved.moves, [moved])
    for value, one in zip(region.exits, after, strict=True):
        before += _least(one.nodes, [end for end in ends if end.source is value])
    down, up = _down(moved, ends), _up(moved, ends)
    best = min((moves for moves in (down, up) if moves), key=_cost, default=None)
    if best is None or _cost(best) >= before:
        return
    if best is down:
        _enter(region, entry, moved.source)
        for end in down:
            _replace(emitter, end)
    else:
        site = emitter.at(producer)
        _enter(region, entry, _emit(site, up[0]))
        site.take_over(ends[0].value, region.exits[0])
    _sweep((*moved.moves, *(node for one in after for node in one.nodes)))


def _vanishes(moved: _Moved, region: Region) -> bool:
    """Whether the region alone reads what the moves in front of it make."""
    inside = {*moved.moves, *region.nodes}
    made = [output for node in moved.moves for output in node.outputs]
    return not any(v.is_graph_output() or any(user not in inside for user, _ in v.uses()) for v in made)


def _down(moved: _Moved, ends: Sequence[_Moved]) -> list[_Moved]:
    """The moves after a region that reads the source of those in front of it; empty where that cannot be."""
    order = moved.order()
    if order is None:
        return []
    moves = []
    for end in ends:
        per_row = (sizes(end.source) or ())[-1] // end.unit
        moves.append(replace(end, index=order[end.index // per_row] * per_row + end.index % per_row))
    return moves if all(one.pays for one in moves) else []


def _up(moved: _Moved, ends: Sequence[_Moved]) -> list[_Moved]:
    """The moves in front of a region if those after it are done there; empty where that cannot be."""
    order = ends[0].order() if len(ends) == 1 else None
    if order is None:
        return []
    shape = (*(sizes(ends[0].value) or ())[:-1], (sizes(moved.value) or ())[-1])
    value = ir.Value(name=moved.value.name, type=moved.value.type, shape=ir.Shape(shape))
    index = moved.index.reshape(len(order), -1)[order]
    found = replace(moved, value=value, index=index)
    return [found] if found.pays else []


def _cost(moves: Iterable[_Moved]) -> int:
    return sum(one.cost for one in moves)


def _least(nodes: Iterable[ir.Node], results: Sequence[_Moved]) -> int:
    """Elements copied by the moves as they are, or as Gathers where that is less."""
    found = sum(map(copied, nodes))
    return min(found, _cost(results)) if all(one.pays for one in results) else found


def _enter(region: Region, entry: ir.Value, new: ir.Value) -> None:
    """Let the region read `new`, with the same rows in another order, instead of `entry`."""
    for node in region.nodes:
        for index, value in enumerate(node.inputs):
            if value is entry:
                node.replace_input_with(index, new)
    region.reshape((sizes(new) or ())[:-1])


def _replace(emitter: Emitter, moved: _Moved) -> None:
    """`moved.value` by a Gather of its source."""
    producer = moved.value.producer()
    assert producer is not None
    site = emitter.at(producer)
    site.take_over(moved.value, _emit(site, moved))


def _emit(site: Site, moved: _Moved) -> ir.Value:
    """The value as views and a Gather of its source, at `site`."""
    chosen, shape, x = moved.rows, sizes(moved.value) or (), moved.source
    if not chosen.identity:
        batch = (chosen.batch,) if chosen.batch > 1 else ()
        count = prod(sizes(x) or ()) // chosen.width // chosen.batch
        x = _view(site, x, (*batch, count, chosen.width))
        indices = site.emitter.constant(chosen.indices, ir.DataType.INT64, "rows")
        gathered = site.op("Gather", x, indices, axis=len(batch))
        x = _known(gathered, moved.source, (*batch, len(chosen.indices), chosen.width))
        site.emitter.count("moves: Gather")
    return _view(site, x, shape, always=x is moved.source)


def _view(site: Site, x: ir.Value, shape: tuple[int, ...], always: bool = False) -> ir.Value:
    if sizes(x) == shape and not always:
        return x
    return _known(site.op("Reshape", x, site.emitter.ints(*shape)), x, shape)


def _known(value: ir.Value, like: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    value.type, value.shape = like.type, ir.Shape(shape)
    return value


def _sweep(nodes: Iterable[ir.Node]) -> None:
    """Remove the moves that nothing reads any more."""
    for node in reversed(list(nodes)):
        if node.graph is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            node.graph.remove(node, safe=True)

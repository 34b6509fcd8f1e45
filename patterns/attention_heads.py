"""Keys and values whose heads are repeated for grouped queries, and caches that are concatenated before them.

The Attention operator lets query head h read key/value head h // G. So only repeats in that order count: every head G
times in a row, as `Unsqueeze -> Expand -> Reshape`, `Tile`, a `Concat` of copies or a `Gather` with repeated indices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from xform.graph.values import attribute, constant, is_op, rank_of, shape_of
from xform.patterns.attention_operands import Operand, operand

HEADS = 1  # axis of the heads in [batch, heads, sequence, size]


@dataclass(frozen=True)
class Repeat:
    """`value` is `source` with every head repeated `times` times in a row; `nodes` do that."""

    source: Operand
    times: int
    nodes: tuple[ir.Node, ...]


def repeated_heads(value: ir.Value | None) -> Repeat | None:
    """Read [B, H * G, T, D] as repeated heads, through transposes that come after the repeat."""
    given = operand(value) if value is not None else None
    if given is None or given.rank != 4:
        return None
    nodes: list[ir.Node] = []
    while (node := given.value.producer()) is not None and is_op(node, "Transpose", "Identity"):
        source = node.inputs[0]
        if source is None or rank_of(source) != 4:
            return None
        inner = attribute(node, "perm", [3, 2, 1, 0]) if node.op_type == "Transpose" else [0, 1, 2, 3]
        given = replace(given, value=source, perm=tuple(inner[i] for i in given.perm))
        nodes.append(node)
    found = _gathered(given) or _reshaped(given)
    return None if found is None else replace(found, nodes=(*nodes, *found.nodes))


def _gathered(given: Operand) -> Repeat | None:
    """Gather(x, [0, 0, 1, 1, ..]) along the heads."""
    node = given.value.producer()
    if node is None or not is_op(node, "Gather") or attribute(node, "axis", 0) % 4 != given.perm[HEADS]:
        return None
    source, indices = node.inputs[0], constant(node.inputs[1], max_elements=4096)
    shape = shape_of(source)
    if source is None or shape is None or indices is None or indices.ndim != 1:
        return None
    heads = shape[given.perm[HEADS]]
    if not isinstance(heads, int) or not heads or indices.size % heads:
        return None
    times = int(indices.size) // heads
    if times < 2 or indices.tolist() != [h for h in range(heads) for _ in range(times)]:
        return None
    return Repeat(replace(given, value=source), times, (node,))


def _reshaped(given: Operand) -> Repeat | None:
    """Reshape of five axes, the one after the heads being copies, into four."""
    node = given.value.producer()
    if node is None or not is_op(node, "Reshape"):
        return None
    axis = given.perm[HEADS]
    wide, result = shape_of(node.inputs[0]), shape_of(given.value)
    copies = _copies(node.inputs[0], axis + 1)
    if wide is None or result is None or copies is None or len(wide) != 5:
        return None
    source, times, nodes = copies
    heads = wide[axis]
    same = (*wide[:axis], *wide[axis + 2 :]) == (*result[:axis], *result[axis + 1 :])
    if not same or None in result or not isinstance(heads, int) or result[axis] != heads * times:
        return None
    return Repeat(replace(given, value=source), times, (node, *nodes))


def _copies(value: ir.Value | None, axis: int) -> tuple[ir.Value, int, tuple[ir.Node, ...]] | None:
    """x and G of a value that holds G copies of x (four axes) along a fifth `axis`."""
    node = value.producer() if value is not None else None
    shape = shape_of(value)
    if node is None or shape is None or len(shape) != 5 or not isinstance(shape[axis], int):
        return None
    times = shape[axis]
    assert isinstance(times, int)
    single: ir.Value | None = None
    if is_op(node, "Expand"):
        single = node.inputs[0]
    elif is_op(node, "Tile"):
        repeats = constant(node.inputs[1], max_elements=5)
        single = node.inputs[0] if repeats is not None and repeats.tolist() == _only(axis, times) else None
    elif is_op(node, "Concat") and attribute(node, "axis") % 5 == axis and len(set(node.inputs)) == 1:
        single = node.inputs[0]
    below = shape_of(single)
    if single is None or below is None or len(below) != 5 or times < 2:
        return None
    if (*below[:axis], *below[axis + 1 :]) != (*shape[:axis], *shape[axis + 1 :]) or below[axis] != 1:
        return None
    inner = single.producer()
    source = inner.inputs[0] if inner is not None and is_op(inner, "Unsqueeze", "Reshape") else None
    narrow = shape_of(source)
    if inner is None or source is None or narrow is None or None in narrow:
        return None
    if narrow != (*below[:axis], *below[axis + 1 :]):
        return None
    return source, times, (node, inner)


def _only(axis: int, times: int) -> list[int]:
    return [times if i == axis else 1 for i in range(5)]


@dataclass(frozen=True)
class Cache:
    """`value` is `past` and `new`, joined along the sequence by `node`."""

    past: ir.Value
    new: ir.Value
    node: ir.Node


def cached(value: ir.Value | None) -> Cache | None:
    """Read [B, H, P + T, D] as a cache and what is new."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Concat") or len(node.inputs) != 2 or rank_of(value) != 4:
        return None
    past, new = node.inputs
    if attribute(node, "axis") % 4 != 2 or past is None or new is None:
        return None
    return Cache(past, new, node)

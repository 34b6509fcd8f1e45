"""Rules that look at one node and its producers; shared by the cleanup passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from xform.graph.values import constant, rank_of, shape_of
from xform.rewrite.matcher import Match, Search
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule


class NodeRule(Rule):
    """A rule that is tried at every node of the given operator types; `check` decides, quietly.

    Attributes:
        op_types: Standard operators.
        levels: How many operators away a change can make the rule fire.
    """

    op_types: ClassVar[tuple[str, ...]]
    concept = "cleanup"
    levels: ClassVar[int] = 2

    def anchors(self) -> frozenset[Key] | None:
        return frozenset(("", op_type) for op_type in self.op_types)

    def reach(self) -> int:
        return self.levels

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if node.outputs:
            yield Match(nodes={"node": node}, roots=(node.outputs[0],))


def given(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index` of `node`, or None if it is omitted."""
    return node.inputs[index] if index < len(node.inputs) else None


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant of integers as a flat list, or None."""
    array = constant(value, max_elements=64)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(x) for x in array.reshape(-1)]


def normalized(axes: list[int], rank: int) -> list[int]:
    """Axes counted from the front."""
    return [a + rank if a < 0 else a for a in axes]


def axes_of(node: ir.Node, rank: int) -> list[int] | None:
    """The constant axes input (second) of `node`, counted from the front of a tensor of `rank`; None if unknown."""
    axes = integers(given(node, 1))
    return None if axes is None else normalized(axes, rank)


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values provably have one shape."""
    left, right = shape_of(a), shape_of(b)
    return left is not None and left == right and None not in left


def is_interface(value: ir.Value) -> bool:
    """Whether a graph output would have to be made from `value` by an Identity (input, initializer or output)."""
    return value.is_graph_input() or value.is_initializer() or value.is_graph_output() or value.producer() is None


def bypass_allowed(node: ir.Node, source: ir.Value) -> bool:
    """Whether readers of the first output may read `source` instead without a new Identity in its place.

    An output of a subgraph must be made inside it, so a value of an outer graph cannot stand for it.
    """
    output = node.outputs[0]
    if not output.is_graph_output():
        return True
    producer = source.producer()
    return not is_interface(source) and producer is not None and producer.graph is node.graph


def known_rank(value: ir.Value | None) -> int:
    """Rank of `value`, or -1 where it is unknown."""
    rank = rank_of(value)
    return -1 if rank is None else rank

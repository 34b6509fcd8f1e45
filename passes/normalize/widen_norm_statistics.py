"""Norms in half precision whose square sum could overflow keep their statistics in float32.

A LayerNormalization or RMSNormalization over d numbers of magnitude up to B sums squares up to d B^2. float16 ends at
65504: at d = 1024 that is B = 8, which residual streams exceed. `stash_type` says in which type the statistics are
computed; the operator's result is of the operand's type in any case.

Rules
1. `widen`: a norm of a float16 operand with statistics in float16, for which range analysis (`xform.graph.bounds`)
   cannot prove d B^2 <= 65504, gets statistics in float32. The centred squares of LayerNorm sum to no more than the
   plain ones.
Left alone: statistics in float32 or wider, bfloat16 (which has float32's range), and what is proven to fit.

The pass is exact: it can only make results more precise.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from xform.graph.bounds import UNKNOWN, Bounds, bounds
from xform.graph.norms import NORMS
from xform.graph.values import attribute, attributes_of, display_name, shape_of
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule

PASS_NAME = "widen_norm_statistics"
LARGEST = 65504.0


def square_sum(node: ir.Node, known: Bounds) -> float:
    """Upper bound of the sum of squares that a norm computes; infinite where nothing is known."""
    x = node.inputs[0]
    shape = shape_of(x)
    if x is None or shape is None:
        return UNKNOWN
    sizes = shape[int(attribute(node, "axis", -1)) % len(shape) :]
    if any(not isinstance(size, int) for size in sizes):
        return UNKNOWN
    return math.prod(size for size in sizes if isinstance(size, int)) * known.get(x, UNKNOWN) ** 2


class Widen(Rule):
    """Rule 1."""

    name = "widen"
    concept = "layer_norm"

    def __init__(self, input_bound: float) -> None:
        self.input_bound = input_bound
        self._known: dict[ir.Graph, Bounds] = {}  # rewrites change no bound, so one sweep serves all norms

    def anchors(self) -> frozenset[Key] | None:
        return frozenset(("", name) for name in NORMS)

    def reach(self) -> int:
        return 0

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        x, half = node.inputs[0], int(ir.DataType.FLOAT16)
        if x is None or x.dtype is not ir.DataType.FLOAT16 or int(attribute(node, "stash_type", 1)) != half:
            return
        if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            yield Failure("its statistics are read in their type", (node,))
            return
        graph = node.graph
        if isinstance(graph, ir.Graph) and graph not in self._known:
            self._known[graph] = bounds(graph, self.input_bound)
        largest = square_sum(node, self._known[graph]) if isinstance(graph, ir.Graph) else UNKNOWN
        if largest > LARGEST:
            nodes: dict[Hashable, ir.Node] = {"norm": node}
            yield Match(nodes=nodes, roots=(node.outputs[0],), data={"largest": largest})

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node, largest = match.node("norm"), match.data["largest"]
        said = f"may reach {largest:.3g}" if math.isfinite(largest) else "has no bound that the weights prove"
        reason = f"the sum of squares {said}, float16 ends at {LARGEST:.0f}: statistics in float32"
        context.remark(PASS_NAME, "range", "applied", (display_name(node),), reason, self.concept)
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        node = match.node("norm")
        attributes = attributes_of(node)
        attributes["stash_type"] = int(ir.DataType.FLOAT)
        return build.op(node.op_type, *node.inputs, **attributes)


@dataclass(frozen=True)
class WidenNormStatistics(RewritePass):
    """Norms in float16 that compute their statistics in float32 where float16 could overflow.

    Attributes:
        input_bound: Largest magnitude of the model's inputs, where known.
    """

    name: ClassVar[str] = PASS_NAME
    input_bound: float | None = None

    def rules(self) -> tuple[Rule, ...]:
        return (Widen(UNKNOWN if self.input_bound is None else self.input_bound),)

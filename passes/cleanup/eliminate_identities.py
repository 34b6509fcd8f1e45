"""Remove Identity and Dropout (which is an identity outside training).

Rules
1. `identity`: readers of Identity(x) read x. Kept where a graph output needs it: x is an input, an initializer, another
   output, or lives in an outer graph.
2. `dropout`: training_mode absent or constant false, or ratio constant zero. A mask that is read is all true.

onnx-ir has an identity elimination too; it is not used, because it renames a value that is already an output, lets a
subgraph return a value of the outer graph, and narrows the declared shapes of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.values import constant, is_constant, scalar
from xform.passes.cleanup.local import NodeRule, bypass_allowed, given
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule


class EliminateIdentity(NodeRule):
    """Rule 1."""

    name = "identity"
    op_types = ("Identity",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        source = node.inputs[0]
        return None if source is not None and bypass_allowed(node, source) else QUIET

    def rewrite(self, match: Match, build: Builder) -> ir.Value | Failure:
        return match.node("node").inputs[0] or QUIET


class EliminateDropout(NodeRule):
    """Rule 2."""

    name = "dropout"
    op_types = ("Dropout",)

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        used = [o for o in node.outputs[1:2] if o.uses() or o.is_graph_output()]
        yield Match(nodes={"node": node}, roots=(node.outputs[0], *used))

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        training, ratio = given(node, 2), given(node, 1)
        if training is None or (is_constant(training) and not np.any(constant(training))):
            return None
        if ratio is not None and scalar(ratio) == 0:
            return None
        return Failure("it may run in training mode", (node,))

    def rewrite(self, match: Match, build: Builder) -> ir.Value | Sequence[ir.Value] | Failure:
        node = match.node("node")
        source = node.inputs[0]
        if source is None:
            return QUIET
        if len(match.roots) == 1:
            return source
        true = ir.tensor(np.array([True]))
        return source, build.op("ConstantOfShape", build.op("Shape", source), value=true)


@dataclass(frozen=True)
class EliminateIdentities(RewritePass):
    """Identity and Dropout removal."""

    name = "eliminate_identities"

    def rules(self) -> Sequence[Rule]:
        return (EliminateIdentity(), EliminateDropout())

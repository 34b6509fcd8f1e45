"""Compute equal expressions once: nodes with the same operator, attributes and inputs become one.

Wraps onnx-ir's CommonSubexpressionEliminationPass, which leaves nodes with subgraphs and five random operators alone.
It does not know of other nodes that must stay apart; those are marked with an attribute of their own while it runs:
1. operators of foreign domains (they may be random or have side effects), Bernoulli, Dropout in training mode;
2. nodes with unnamed optional outputs (the twin may name them);
3. Identity nodes that make graph outputs, and outputs listed twice: merging them needs a new Identity, without end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from xform.graph.values import ONNX_DOMAINS
from xform.passes.cleanup.library import LibraryPass

_MARK = "xform_apart"
_RANDOM = frozenset({"Bernoulli", "Dropout"})


@dataclass(frozen=True)
class EliminateCommonSubexpressions(LibraryPass):
    """Common-subexpression elimination in the main graph.

    Attributes:
        size_limit: Largest number of elements of a tensor attribute that is compared.
    """

    name = "eliminate_common_subexpressions"
    size_limit: int = 64

    def apply(self, model: ir.Model) -> bool:
        twice = {v for v, n in Counter(model.graph.outputs).items() if n > 1}
        apart = [node for node in model.graph if _stays_apart(node, twice)]
        for index, node in enumerate(apart):
            node.attributes[_MARK] = ir.AttrInt64(_MARK, index)
        try:
            return bool(CommonSubexpressionEliminationPass(size_limit=self.size_limit)(model).modified)
        finally:
            for node in apart:
                node.attributes.pop(_MARK, None)


def _stays_apart(node: ir.Node, twice: set[ir.Value]) -> bool:
    if node.domain not in ONNX_DOMAINS or node.op_type in _RANDOM:
        return True
    if any(not v.name for v in node.outputs) or any(v in twice for v in node.outputs):
        return True
    return node.op_type == "Identity" and node.outputs[0].is_graph_output()

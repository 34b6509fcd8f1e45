"""Remove what no output depends on: nodes, optional outputs, initializers, functions, opset imports.

Wraps onnx-ir's RemoveUnusedNodesPass, RemoveUnusedFunctionsPass and RemoveUnusedOpsetsPass. Inputs stay, used or not.

A node with a body (If, Loop, Scan) that is removed leaves the nodes of its body holding the values they read from
outside, whoever removed it. `forget_removed` takes these uses away, so that what fed only that body is removed too.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from xform.passes.cleanup.library import LibraryPass


@dataclass(frozen=True)
class RemoveDeadCode(LibraryPass):
    """Dead-code elimination."""

    name = "remove_dead_code"

    def apply(self, model: ir.Model) -> bool:
        nodes = False
        forget_removed(model)
        while RemoveUnusedNodesPass()(model).modified:
            nodes = True
            if not forget_removed(model):
                break
        functions = RemoveUnusedFunctionsPass()(model).modified  # type: ignore[no-untyped-call]
        opsets = RemoveUnusedOpsetsPass()(model).modified
        return bool(nodes or functions or opsets)


def forget_removed(model: ir.Model) -> bool:
    """Drop the uses of the model's values by nodes that are no longer in the model; return whether there were any."""
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = [node for part in parts for node in ir.traversal.RecursiveGraphIterator(part)]
    present = set(nodes)
    values = {value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None}
    for graph in model.graphs():
        values.update(graph.inputs, graph.initializers.values())
    found = False
    for value in values:
        for use in list(value.uses()):
            if use.node not in present:
                use.node.replace_input_with(use.idx, None)
                found = True
    return found

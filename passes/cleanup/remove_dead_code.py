"""Remove what no output depends on: nodes, optional outputs, initializers, functions, opset imports.

Wraps onnx-ir's RemoveUnusedNodesPass, RemoveUnusedFunctionsPass and RemoveUnusedOpsetsPass. Inputs stay, used or not.
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
        nodes = RemoveUnusedNodesPass()(model).modified
        functions = RemoveUnusedFunctionsPass()(model).modified  # type: ignore[no-untyped-call]
        opsets = RemoveUnusedOpsetsPass()(model).modified
        return bool(nodes or functions or opsets)

"""Constants and shapes settled together: what folds makes more shapes known, and known shapes make more fold.

Padding that is computed from dims, as TorchScript exports write it, takes two or three turns: the dims become
constants, the pads fold, the Pad gets a static shape, and what was computed from that shape becomes constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.shapes import infer_shapes
from xform.passes.cleanup.eliminate_identities import EliminateIdentities
from xform.passes.cleanup.eliminate_no_ops import EliminateNoOps
from xform.passes.cleanup.fold_constants import FoldConstants
from xform.passes.cleanup.fold_shape_arithmetic import FoldShapeArithmetic
from xform.rewrite.passes import Pass, PassContext


@dataclass(frozen=True)
class PropagateConstants(Pass):
    """fold_constants, fold_shape_arithmetic, eliminate_no_ops and shape inference in turn, until nothing changes.

    Attributes:
        turns: Largest number of turns.
    """

    name = "propagate_constants"
    turns: int = 8

    def run(self, model: ir.Model, context: PassContext) -> bool:
        steps = (EliminateIdentities(), FoldConstants(), FoldShapeArithmetic(), EliminateNoOps())
        changed_at_all = False
        for _ in range(self.turns):
            changed = [step.run(model, context) for step in steps]
            if not any(changed):
                break
            changed_at_all = True
            infer_shapes(model)
        return changed_at_all

"""Cleanup: less to compute, fewer nodes, the same values."""

from __future__ import annotations

from xform.passes.cleanup.deduplicate_initializers import DeduplicateInitializers
from xform.passes.cleanup.eliminate_common_subexpressions import EliminateCommonSubexpressions
from xform.passes.cleanup.eliminate_identities import EliminateIdentities
from xform.passes.cleanup.eliminate_no_ops import EliminateNoOps
from xform.passes.cleanup.eliminate_unread_rows import EliminateUnreadRows
from xform.passes.cleanup.fold_constants import FoldConstants
from xform.passes.cleanup.fold_shape_arithmetic import FoldShapeArithmetic
from xform.passes.cleanup.infer_shapes import InferShapes
from xform.passes.cleanup.propagate_constants import PropagateConstants
from xform.passes.cleanup.remove_dead_code import RemoveDeadCode
from xform.passes.cleanup.settle import Settle
from xform.passes.cleanup.simplify_layout import SimplifyLayout

__all__ = [
    "DeduplicateInitializers",
    "EliminateCommonSubexpressions",
    "EliminateIdentities",
    "EliminateNoOps",
    "EliminateUnreadRows",
    "FoldConstants",
    "FoldShapeArithmetic",
    "InferShapes",
    "PropagateConstants",
    "RemoveDeadCode",
    "Settle",
    "SimplifyLayout",
]

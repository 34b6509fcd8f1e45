"""Normalizations over the channels, which the canonical form has as the last axis."""

from __future__ import annotations

import onnx_ir as ir

from xform.graph.values import attribute, is_op, rank_of, shape_of

NORMS = ("LayerNormalization", "RMSNormalization")

# Metadata of a normalization whose scale is one and whose bias is zero, because both were moved into its readers.
# Kernels that multiply by a scale in any case may leave that out.
IDENTITY_AFFINE = "xform.identity_affine"


def normalized_axis(node: ir.Node) -> int | None:
    """The one axis of fixed size that a LayerNormalization or RMSNormalization runs over; None for everything else."""
    if not is_op(node, *NORMS) or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return None
    rank, shape = rank_of(node.inputs[0]), shape_of(node.inputs[0])
    if not rank or shape is None or not isinstance(shape[-1], int) or shape[-1] < 2:
        return None
    return rank - 1 if int(attribute(node, "axis", -1)) % rank == rank - 1 else None


def computing_type(node: ir.Node, dtype: ir.DataType) -> ir.DataType:
    """The dtype that a normalization of `dtype` is computed in: `stash_type`, but float64 in float64.

    The standard's default for `stash_type` is float32 whatever the operand is. ONNX Runtime's kernels do not round a
    float64 to it, and a form that did would lose half of the digits.
    """
    return dtype if dtype is ir.DataType.DOUBLE else ir.DataType(attribute(node, "stash_type", 1))

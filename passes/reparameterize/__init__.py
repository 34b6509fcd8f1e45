"""Reparameterization: the same function with fewer or cheaper parameters."""

from __future__ import annotations

from xform.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from xform.passes.reparameterize.merge_affine_maps import MergeAffineMaps
from xform.passes.reparameterize.raise_block_linear import RaiseBlockLinear

__all__ = ["FoldBatchNorm", "MergeAffineMaps", "RaiseBlockLinear"]

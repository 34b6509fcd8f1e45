"""Reparameterization: the same function with fewer or cheaper parameters."""

from __future__ import annotations

from xform.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from xform.passes.reparameterize.merge_affine_maps import MergeAffineMaps

__all__ = ["FoldBatchNorm", "MergeAffineMaps"]

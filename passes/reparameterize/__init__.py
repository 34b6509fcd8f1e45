"""Reparameterization: the same function with fewer or cheaper parameters."""

from __future__ import annotations

from xform.passes.reparameterize.fold_batch_norm import FoldBatchNorm

__all__ = ["FoldBatchNorm"]

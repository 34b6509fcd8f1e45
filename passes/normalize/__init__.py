"""Passes on normalizations and on the residual streams that they read."""

from __future__ import annotations

from xform.passes.normalize.absorb_norm_affine import AbsorbNormAffine
from xform.passes.normalize.compress_rms_norm import CompressRMSNorm
from xform.passes.normalize.layer_norm_to_rms_norm import LayerNormToRMSNorm
from xform.passes.normalize.layer_wise_scales import LayerWiseScales
from xform.passes.normalize.migrate_scales import MigrateScales
from xform.passes.normalize.widen_norm_statistics import WidenNormStatistics

__all__ = [
    "AbsorbNormAffine",
    "CompressRMSNorm",
    "LayerNormToRMSNorm",
    "LayerWiseScales",
    "MigrateScales",
    "WidenNormStatistics",
]

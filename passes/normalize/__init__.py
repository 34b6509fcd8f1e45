"""Passes on normalizations and on the residual streams that they read."""

from __future__ import annotations

from xform.passes.normalize.layer_norm_to_rms_norm import LayerNormToRMSNorm

__all__ = ["LayerNormToRMSNorm"]

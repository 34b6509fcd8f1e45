"""Floats of fewer bits."""

from xform.passes.precision.convert_precision import ConvertPrecision

__all__ = ["ConvertPrecision"]

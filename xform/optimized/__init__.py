"""What `optimize` and `load` return: something to call like the original, and to ask what was done."""

from __future__ import annotations

from xform.optimized.base import Optimized
from xform.optimized.calls import call_arguments
from xform.optimized.graph import OptimizedGraph
from xform.optimized.loaded import LoadedModel, load
from xform.optimized.module import OptimizedModule

__all__ = ["LoadedModel", "Optimized", "OptimizedGraph", "OptimizedModule", "call_arguments", "load"]

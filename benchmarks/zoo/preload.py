"""Imported once by the fork server of benchmarks/capture.py, so that every architecture's process starts with it."""

import onnxruntime

import xform.api
import xform.capture
import zoo.timm_families
import zoo.transformers_types

__all__ = ["onnxruntime", "xform", "zoo"]

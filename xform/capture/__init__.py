"""Capture: a torch module or an ONNX file as a graph."""

from xform.capture.torch_module import CapturedModule, capture_torch

__all__ = ["CapturedModule", "capture_torch"]

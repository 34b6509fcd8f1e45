"""Capture: a torch module or an ONNX file as a graph."""

from xform.capture.onnx_file import capture_onnx
from xform.capture.torch_module import CapturedModule, capture_torch

__all__ = ["CapturedModule", "capture_onnx", "capture_torch"]

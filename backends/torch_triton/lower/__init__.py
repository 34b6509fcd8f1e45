"""An ONNX graph as a torch `GraphModule`."""

from __future__ import annotations

from xform.backends.torch_triton.lower.graph import to_torch

__all__ = ["to_torch"]

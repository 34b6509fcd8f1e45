"""What the tests of torch capture share: running a captured graph, and comparing results of any structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch.utils import _pytree as pytree

from xform.capture import CapturedModule


def call(captured: CapturedModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """What the captured graph gives for a call of the module, in ONNX Runtime with its optimizations off."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(captured.model).SerializeToString(), options)
    feeds = {name: tensor.numpy() for name, tensor in captured.flatten(args, kwargs).items()}
    return captured.unflatten([torch.from_numpy(array) for array in session.run(None, feeds)], args, kwargs)


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same structure, classes, dtypes and shapes, and max|a - b| / max|b| within the tolerance per tensor."""
    assert type(actual) is type(expected)
    left, left_spec = pytree.tree_flatten(actual)
    right, right_spec = pytree.tree_flatten(expected)
    assert left_spec == right_spec
    for a, b in zip(left, right, strict=True):
        if not isinstance(b, torch.Tensor):
            assert type(a) is type(b) and a == b
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if b.numel():
            error = (a.to(torch.complex128) - b.to(torch.complex128)).abs().max()
            assert error <= tolerance * b.to(torch.complex128).abs().max(), f"relative error {error}"

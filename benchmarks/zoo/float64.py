"""Run a float64 graph, which ONNX Runtime cannot: it has no double convolution. Parts in float32 run in float64 too.

ONNX's reference evaluator, with PyTorch for the operators that it computes slowly (convolutions and pooling are Python
loops there) or rounds to float32 (normalizations, whose `stash_type` says float32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional as F

from xform.passes.cleanup import FoldConstants, InferShapes
from xform.pipeline.manager import run_pipeline

Array = npt.NDArray[Any]


def evaluate(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    """Outputs of `model` on `feeds`, in the order of the graph's outputs.

    What it computes from constants alone is folded first: a table of cosines in float32 is one in every runtime, and
    must not differ by how wide the judge computes it.
    """
    model = run_pipeline(model, [InferShapes(), FoldConstants()], verify="off").model
    session = ReferenceEvaluator(_widened(ir.to_proto(model)), new_ops=list(_OPERATORS))
    return [np.asarray(output) for output in session.run(None, dict(feeds))]


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with float32 constants and Casts to float32 in float64, so that no part of it rounds to float32.

    Some models compute a part in float32 whatever their dtype. They are judged by their algebra there too.
    """
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        tensors.extend(attr.t for attr in node.attribute if attr.HasField("t"))
        for attr in node.attribute:
            if node.op_type == "Cast" and attr.name == "to" and attr.i == single:
                attr.i = double
    for tensor in tensors:
        if tensor.data_type == single:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    return model


def _padding(
    auto_pad: str, pads: list[int] | None, size: tuple[int, ...], kernel: list[int], strides: list[int]
) -> Any:
    """Begins and ends per spatial axis."""
    rank = len(kernel)
    if auto_pad in ("NOTSET", "", None):
        pads = list(pads or [0] * (2 * rank))
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    both = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, kernel, strides, strict=True)]
    return [(b // 2, b - b // 2) if auto_pad == "SAME_UPPER" else (b - b // 2, b // 2) for b in both]


def _pad(x: torch.Tensor, pads: Any, value: float = 0.0) -> torch.Tensor:
    flat = [n for begin, end in reversed(pads) for n in (begin, end)]
    return F.pad(x, flat, value=value) if any(flat) else x


def _effective(kernel: Any, dilations: Any) -> list[int]:
    return [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]


class Conv(OpRun):
    """Convolution in any rank."""

    op_domain = ""

    def _run(self, x, w, b=None, auto_pad=None, dilations=None, group=1, kernel_shape=None, pads=None, strides=None):  # type: ignore[no-untyped-def]
        rank = w.ndim - 2
        strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
        sides = _padding(auto_pad, pads, x.shape[2:], _effective(w.shape[2:], dilations), strides)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        bias = None if b is None else torch.from_numpy(np.array(b))
        x, w = _pad(torch.from_numpy(np.array(x)), sides), torch.from_numpy(np.array(w))
        return (convolve(x, w, bias, stride=strides, dilation=dilations, groups=group or 1).numpy(),)


class ConvTranspose(OpRun):
    """Transposed convolution with explicit symmetric padding."""

    op_domain = ""

    def _run(  # type: ignore[no-untyped-def]
        self, x, w, b=None, auto_pad=None, dilations=None, group=1, kernel_shape=None, output_padding=None,
        output_shape=None, pads=None, strides=None,
    ):  # fmt: skip
        rank = w.ndim - 2
        pads = list(pads or [0] * (2 * rank))
        if output_shape or auto_pad not in (None, "NOTSET", "") or pads[:rank] != pads[rank:]:
            raise NotImplementedError("ConvTranspose with automatic or uneven padding")
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        bias = None if b is None else torch.from_numpy(np.array(b))
        result = convolve(
            torch.from_numpy(np.array(x)), torch.from_numpy(np.array(w)), bias, stride=list(strides or [1] * rank),
            padding=pads[:rank], output_padding=list(output_padding or [0] * rank), groups=group or 1,
            dilation=list(dilations or [1] * rank),
        )  # fmt: skip
        return (result.numpy(),)


def _windows(x: torch.Tensor, kernel: list[int], strides: list[int], ceil_mode: int, fill: float) -> torch.Tensor:
    """All windows, flattened on the last axis; positions past the end (ceil_mode) hold `fill`."""
    for axis, (k, s) in enumerate(zip(kernel, strides, strict=True), start=2):
        size = x.shape[axis]
        steps = -(-(size - k) // s) if ceil_mode else (size - k) // s
        if steps * s >= size:  # the last window would start past the input and its padding
            steps -= 1
        missing = max(steps * s + k - size, 0)
        sides = [(0, 0)] * (x.ndim - 2)
        sides[axis - 2] = (0, missing)
        x = _pad(x, sides, fill)
    for axis, (k, s) in enumerate(zip(kernel, strides, strict=True), start=2):
        x = x.unfold(axis, k, s)
    return x.flatten(-len(kernel))


class AveragePool(OpRun):
    """Average over windows: a sum over what counts, divided by how much counts."""

    op_domain = ""

    def _run(  # type: ignore[no-untyped-def]
        self, x, auto_pad=None, ceil_mode=0, count_include_pad=0, dilations=None, kernel_shape=None, pads=None,
        strides=None,
    ):  # fmt: skip
        if dilations and any(d != 1 for d in dilations):
            raise NotImplementedError("AveragePool with dilation")
        strides = list(strides or [1] * len(kernel_shape))
        sides = _padding(auto_pad, pads, x.shape[2:], list(kernel_shape), strides)
        values = torch.from_numpy(np.array(x))
        ones = torch.ones_like(values[:1, :1])
        counted = _pad(ones, sides, 1.0 if count_include_pad else 0.0)
        total = _windows(_pad(values, sides), list(kernel_shape), strides, ceil_mode or 0, 0.0).sum(-1)
        count = _windows(counted, list(kernel_shape), strides, ceil_mode or 0, 0.0).sum(-1)
        return ((total / count).numpy(),)


class MaxPool(OpRun):
    """Largest over windows."""

    op_domain = ""

    def _run(  # type: ignore[no-untyped-def]
        self, x, auto_pad=None, ceil_mode=0, dilations=None, kernel_shape=None, pads=None, storage_order=None,
        strides=None,
    ):  # fmt: skip
        if dilations and any(d != 1 for d in dilations):
            raise NotImplementedError("MaxPool with dilation")
        strides = list(strides or [1] * len(kernel_shape))
        sides = _padding(auto_pad, pads, x.shape[2:], list(kernel_shape), strides)
        low = float("-inf")
        windows = _windows(
            _pad(torch.from_numpy(np.array(x)), sides, low), list(kernel_shape), strides, ceil_mode or 0, low
        )
        return (windows.amax(-1).numpy(),)


class LayerNormalization(OpRun):
    """In the type of its operand."""

    op_domain = ""

    def _run(self, x, scale, b=None, axis=-1, epsilon=1e-5, stash_type=1):  # type: ignore[no-untyped-def]
        axes = tuple(range(axis % x.ndim, x.ndim))
        centred = x - x.mean(axis=axes, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + epsilon) * scale
        return (y if b is None else y + b,)


class RMSNormalization(OpRun):
    """In the type of its operand."""

    op_domain = ""

    def _run(self, x, scale, axis=-1, epsilon=1e-5, stash_type=1):  # type: ignore[no-untyped-def]
        axes = tuple(range(axis % x.ndim, x.ndim))
        return (x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + epsilon) * scale,)


class Gelu(OpRun):
    """Both forms, by PyTorch."""

    op_domain = ""

    def _run(self, x, approximate="none"):  # type: ignore[no-untyped-def]
        return (F.gelu(torch.from_numpy(np.array(x)), approximate=approximate or "none").numpy(),)


class Erf(OpRun):
    """By PyTorch."""

    op_domain = ""

    def _run(self, x):  # type: ignore[no-untyped-def]
        return (torch.erf(torch.from_numpy(np.array(x))).numpy(),)


class HardSwish(OpRun):
    """x min(max(x + 3, 0), 6) / 6; the function body of ONNX has 1/6 in float32."""

    op_domain = ""

    def _run(self, x):  # type: ignore[no-untyped-def]
        return (F.hardswish(torch.from_numpy(np.array(x))).numpy(),)


class HardSigmoid(OpRun):
    """An alpha of 1/6, which an attribute holds in float32, means 1/6."""

    op_domain = ""

    def _run(self, x, alpha=0.2, beta=0.5):  # type: ignore[no-untyped-def]
        exact = 1 / 6 if abs(alpha * 6 - 1) < 1e-6 else alpha
        return (np.clip(x * exact + beta, 0, 1),)


class BatchNormalization(OpRun):
    """In inference."""

    op_domain = ""

    def _run(self, x, scale, bias, mean, var, epsilon=1e-5, momentum=None, training_mode=None):  # type: ignore[no-untyped-def]
        shape = (1, -1, *[1] * (x.ndim - 2))
        factor = scale / np.sqrt(var + epsilon)
        return (x * factor.reshape(shape) + (bias - mean * factor).reshape(shape),)


class Attention(OpRun):
    """On four axes, without a cache; a scale of 1 / sqrt(width), which an attribute holds in float32, means that."""

    op_domain = ""

    def _run(self, query, key, value, mask=None, past_key=None, past_value=None, scale=None, is_causal=0, **attributes):  # type: ignore[no-untyped-def]
        if query.ndim != 4 or past_key is not None or attributes.get("softcap"):
            raise NotImplementedError("Attention with packed heads, a cache or a soft cap")
        natural = query.shape[-1] ** -0.5
        if scale is None or abs(scale / natural - 1) < 1e-6:
            scale = natural
        groups = query.shape[1] // key.shape[1]
        logits = query @ np.repeat(key, groups, axis=1).swapaxes(-1, -2) * scale
        if mask is not None:
            logits = np.where(mask, logits, -np.inf) if mask.dtype == np.bool_ else logits + mask
        if is_causal:
            logits = np.where(np.tril(np.ones(logits.shape[-2:], dtype=np.bool_)), logits, -np.inf)
        weights = torch.softmax(torch.from_numpy(logits), dim=-1).numpy()
        return (weights @ np.repeat(value, groups, axis=1),)


class GatherElements(OpRun):
    """ONNX's own evaluator takes at most 64 entries an axis."""

    op_domain = ""

    def _run(self, data, indices, axis=0):  # type: ignore[no-untyped-def]
        shape = [indices.shape[i] if i == axis % data.ndim else n for i, n in enumerate(data.shape)]
        if list(indices.shape) != shape:
            raise NotImplementedError("GatherElements of a part of the other axes")
        return (np.take_along_axis(data, np.where(indices < 0, indices + data.shape[axis], indices), axis=axis),)


_OPERATORS = (
    Conv, ConvTranspose, AveragePool, MaxPool, LayerNormalization, RMSNormalization, Gelu, Erf, HardSwish, HardSigmoid,
    BatchNormalization, Attention, GatherElements,
)  # fmt: skip

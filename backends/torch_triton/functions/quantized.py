"""Quantization: numbers as scale (q - zero), rounded half to even and saturated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xform.backends.torch_triton.functions.convolution import conv_any
from xform.backends.torch_triton.functions.numbers import cast_float8
from xform.backends.torch_triton.functions.products import matmul_integer


def _spread(parameter: torch.Tensor, x: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Scale or zero point in a shape that broadcasts to `x`: one number, one for each place of `axis` or block."""
    if block:
        axis = axis % x.ndim
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if (parameter.ndim == 1 and parameter.numel() > 1) or (parameter.ndim == 1 and x.ndim > 1):
        shape = [1] * x.ndim
        shape[axis if parameter.numel() > 1 else -1] = -1
        return parameter.reshape(shape)
    return parameter


def _zero_like(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    axis: int,
    block: int,
    dtype: torch.dtype,
    saturate: bool,
) -> torch.Tensor:
    """QuantizeLinear."""
    wide = x.to(torch.float32) if not x.is_floating_point() else x
    ratio = wide / _spread(scale, x, axis, block).to(wide.dtype)
    if dtype.is_floating_point:
        if zero is not None:
            ratio = ratio + _spread(zero.to(torch.float32), x, axis, block).to(ratio.dtype)
        return cast_float8(ratio, dtype, saturate)
    limits = torch.iinfo(dtype)
    offset = _spread(_zero_like(scale, zero).to(torch.int32), x, axis, block)
    shifted = torch.round(ratio.to(torch.float32) if ratio.dtype is not torch.float64 else ratio) + offset
    return shifted.clamp(limits.min, limits.max).to(dtype)


def dequantize(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, axis: int, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """DequantizeLinear, computed in the dtype of the scale and no less than float32."""
    wide = torch.float64 if scale.dtype is torch.float64 else torch.float32
    factor = _spread(scale, x, axis, block).to(wide)
    number = x.to(wide) if x.dtype.is_floating_point else x.to(torch.int64)
    if zero is not None and not zero.dtype.is_floating_point:
        number = number - _spread(zero.to(torch.int64), x, axis, block)
    elif zero is not None:
        number = number - _spread(zero.to(wide), x, axis, block)
    return (number.to(wide) * factor).to(dtype)


def dynamic_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DynamicQuantizeLinear to uint8: the range of `x`, with 0 in it, in 255 steps; of nothing, that of 0 alone.

    A NaN has no part in the range, and becomes 0, as in ONNX Runtime.
    """
    numbers = torch.where(x.isnan(), 0.0, x)
    ends = (numbers.amin(), numbers.amax()) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp(0, 255))
    quantized = (torch.round(x / scale) + zero).clamp(0, 255)
    return torch.where(quantized.isnan(), 0.0, quantized).to(torch.uint8), scale, zero.to(torch.uint8)


def _requantized(total: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """An int32 sum in units of `factor` as a number of the type of `zero`."""
    if zero.dtype.is_floating_point:
        return cast_float8(total * factor / scale + zero.to(torch.float32), zero.dtype, True)
    limits = torch.iinfo(zero.dtype)
    shifted = torch.round(total.to(factor.dtype) * (factor / scale)) + zero.to(torch.int32)
    return shifted.clamp(limits.min, limits.max).to(zero.dtype)


def matmul(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero: torch.Tensor,
) -> torch.Tensor:
    """QLinearMatMul; vectors of parameters are one for each row of a, or each column of b."""
    rows = a_scale[:, None] if a_scale.ndim == 1 and a_scale.numel() > 1 else a_scale
    if a.dtype.is_floating_point:
        product = torch.matmul(
            a.to(torch.float32) - a_zero.to(torch.float32), b.to(torch.float32) - b_zero.to(torch.float32)
        )
        return _requantized(product, rows * b_scale, y_scale, y_zero)
    factor = rows.to(torch.float32) * b_scale.to(torch.float32)
    return _requantized(matmul_integer(a, b, a_zero, b_zero), factor, y_scale.to(torch.float32), y_zero)


def conv_integer(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_zero: torch.Tensor | None,
    weight_zero: torch.Tensor | None,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> torch.Tensor:
    """ConvInteger in int32. float64 is exact: the products have at most 17 bits, their sums far less than 53."""
    left = x.to(torch.float64) if x_zero is None else x.to(torch.float64) - x_zero.to(torch.float64)
    right = weight.to(torch.float64)
    if weight_zero is not None:
        shape = [-1, *[1] * (weight.ndim - 1)] if weight_zero.ndim == 1 else []
        right = right - weight_zero.to(torch.float64).reshape(shape or weight_zero.shape)
    return conv_any(left, right, strides, pads, dilations, group).to(torch.int32)


def conv(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero: torch.Tensor,
    bias: torch.Tensor | None,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> torch.Tensor:
    """QLinearConv; the bias is int32 in units of the product of both scales."""
    total = conv_integer(x, weight, x_zero, weight_zero, strides, pads, dilations, group)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    if bias is not None:
        total = total + bias.reshape(shape)
    factor = x_scale * (weight_scale.reshape(shape) if weight_scale.ndim == 1 else weight_scale)
    return _requantized(total, factor, y_scale, y_zero)

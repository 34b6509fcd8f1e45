"""Convolutions with ONNX's paddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX's (begins..., ends...) in the order of F.pad: last axis first, begin and end together."""
    count = len(pads) // 2
    return [amount for i in reversed(range(count)) for amount in (pads[i], pads[i + count])]


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], upper: bool
) -> list[int]:
    """(begins..., ends...) for an output of ceil(size / stride) elements; the odd one is at the end if `upper`."""
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        less = total // 2
        begins.append(less if upper else total - less)
        ends.append(total - less if upper else less)
    return begins + ends


def pad_same(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    upper: bool,
    value: float = 0.0,
) -> torch.Tensor:
    """x padded for SAME_UPPER or SAME_LOWER."""
    return F.pad(x, torch_pads(same_pads(x.shape[2:], kernel, strides, dilations, upper)), value=value)


def transposed_pads(
    sizes: Sequence[int],
    wanted: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    extra: Sequence[int],
    upper: bool,
) -> list[int]:
    """Pads of a ConvTranspose such that its output has the wanted sizes."""
    begins, ends = [], []
    for size, want, k, stride, dilation, more in zip(sizes, wanted, kernel, strides, dilations, extra, strict=True):
        total = stride * (size - 1) + more + dilation * (k - 1) + 1 - want
        less = total // 2
        begins.append(less if upper else total - less)
        ends.append(total - less if upper else less)
    return begins + ends


def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    extra: Sequence[int],
    group: int,
) -> torch.Tensor:
    """ConvTranspose: the full one, of which the pads are cut off and to which `extra` is added at the ends.

    torch takes one pad for both ends, so what the ends differ by is cut (or added, with the bias) afterwards.
    """
    count = len(strides)
    common = [max(min(pads[i], pads[i + count] - extra[i]), 0) for i in range(count)]
    result = _TRANSPOSE[count](x, weight, bias, list(strides), common, 0, group, list(dilations))
    rest = [-(pads[i] - common[i]) for i in range(count)]
    rest += [extra[i] - (pads[i + count] - common[i]) for i in range(count)]
    if any(amount < 0 for amount in rest):
        result = F.pad(result, torch_pads([min(amount, 0) for amount in rest]))
    if any(amount > 0 for amount in rest):
        shape = [1, -1, *[1] * count]
        result = result if bias is None else result - bias.reshape(shape)
        result = F.pad(result, torch_pads([max(amount, 0) for amount in rest]))
        result = result if bias is None else result + bias.reshape(shape)
    return result


def conv_any(
    x: torch.Tensor,
    weight: torch.Tensor,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> torch.Tensor:
    """Convolution over 1 to 3 axes."""
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(strides)]
    padded = F.pad(x, torch_pads(pads)) if any(pads) else x
    return function(padded, weight, None, list(strides), 0, list(dilations), group)


def deform_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    offset_group: int,
) -> torch.Tensor:
    """DeformConv over two axes: every tap of the kernel reads, bilinearly, from its place plus an offset.

    Args:
        x: [N, C, H, W]; weight: [M, C / group, kH, kW].
        offset: [N, offset_group * kH * kW * 2, oH, oW], rows before columns; mask: [N, offset_group * kH * kW, oH, oW].
    """
    n, channels, height, width = x.shape
    m, _, kh, kw = weight.shape
    oh, ow = offset.shape[-2:]
    taps = kh * kw
    shift = offset.reshape(n, offset_group, taps, 2, oh, ow)
    rows = torch.arange(kh, device=x.device, dtype=x.dtype) * dilations[0]
    columns = torch.arange(kw, device=x.device, dtype=x.dtype) * dilations[1]
    tap = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(taps, 2)
    y0 = torch.arange(oh, device=x.device, dtype=x.dtype) * strides[0] - pads[0]
    x0 = torch.arange(ow, device=x.device, dtype=x.dtype) * strides[1] - pads[1]
    y = y0.reshape(1, 1, 1, oh, 1) + tap[:, 0].reshape(1, 1, taps, 1, 1) + shift[:, :, :, 0]
    at = x0.reshape(1, 1, 1, 1, ow) + tap[:, 1].reshape(1, 1, taps, 1, 1) + shift[:, :, :, 1]
    # grid_sample wants places in [-1, 1] between the centres of the outermost pixels
    grid = torch.stack((2 * at / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), -1)
    if width == 1:
        grid = torch.stack((at, grid[..., 1]), -1)
    if height == 1:
        grid = torch.stack((grid[..., 0], y), -1)
    planes = x.reshape(n * offset_group, channels // offset_group, height, width)
    flat = grid.reshape(n * offset_group, taps * oh, ow, 2)
    read = F.grid_sample(planes, flat, mode="bilinear", padding_mode="zeros", align_corners=True)
    read = read.reshape(n, offset_group, channels // offset_group, taps, oh, ow)
    if mask is not None:
        read = read * mask.reshape(n, offset_group, 1, taps, oh, ow)
    read = read.reshape(n, group, channels // group * taps, oh * ow)
    result = torch.matmul(weight.reshape(group, m // group, -1), read).reshape(n, m, oh, ow)
    return result if bias is None else result + bias.reshape(1, -1, 1, 1)

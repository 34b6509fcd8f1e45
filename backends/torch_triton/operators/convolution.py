"""Convolutions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from xform.backends.torch_triton.functions import convolution
from xform.backends.torch_triton.lower.site import Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def spatial_rank(site: Site, weight: int = 1) -> int:
    """Number of spatial axes."""
    rank = site.rank(0) or site.rank(weight)
    if rank is None:
        raise Unsupported("the rank of its input is unknown")
    return rank - 2


def kernel_of(site: Site, weight: int = 1) -> list[int]:
    """The spatial dims of the kernel."""
    given = site.attr("kernel_shape")
    shape = site.shape(weight)
    if given is None and (shape is None or not all(isinstance(d, int) for d in shape[2:])):
        raise Unsupported("the shape of its kernel is unknown")
    return list(given) if given is not None else [int(d or 0) for d in shape[2:]]  # type: ignore[index]


def listed(site: Site, name: str, count: int, default: int) -> list[int]:
    """An attribute with one number for each axis."""
    return list(site.attr(name, None) or [default] * count)


def padding(site: Site, count: int, kernel: list[int], strides: list[int], dilations: list[int]) -> Any:
    """`pads` as (begins..., ends...), or the string "SAME_UPPER" or "SAME_LOWER" if it depends on a dynamic size."""
    auto = site.attr("auto_pad", "NOTSET")
    if auto == "VALID":
        return [0] * 2 * count
    if auto == "NOTSET":
        return listed(site, "pads", 2 * count, 0)
    shape = site.shape(0)
    sizes = [None] * count if shape is None else list(shape[2:])
    if not all(isinstance(size, int) for size in sizes):
        return auto
    return convolution.same_pads([int(s or 0) for s in sizes], kernel, strides, dilations, auto == "SAME_UPPER")


@lowers("Conv")
def conv(site: Site) -> Any:
    count = spatial_rank(site)
    if count not in _CONV:
        raise Unsupported(f"torch convolves over 1 to 3 axes, not {count}")
    kernel = kernel_of(site)
    strides, dilations = listed(site, "strides", count, 1), listed(site, "dilations", count, 1)
    pads = padding(site, count, kernel, strides, dilations)
    x, weight, bias = site.tensor(0), site.tensor(1), site.optional(2)
    if isinstance(pads, str):
        x = site.call(convolution.pad_same, x, kernel, strides, dilations, pads == "SAME_UPPER")
        pads = [0] * 2 * count
    elif pads[:count] != pads[count:] or min(pads) < 0:
        x = site.call(F.pad, x, convolution.torch_pads(pads))
        pads = [0] * 2 * count
    group = site.attr("group", 1)
    return site.call(_CONV[count], x, weight, bias, strides, pads[:count], dilations, group)


@lowers("ConvTranspose")
def conv_transpose(site: Site) -> Any:
    count = spatial_rank(site)
    kernel = kernel_of(site)
    strides, dilations = listed(site, "strides", count, 1), listed(site, "dilations", count, 1)
    extra = listed(site, "output_padding", count, 0)
    shape = site.shape(0)
    wanted = site.attr("output_shape")
    auto = site.attr("auto_pad", "NOTSET")
    pads = listed(site, "pads", 2 * count, 0) if auto in ("NOTSET", "VALID") else None
    if wanted is not None or pads is None:
        if shape is None or not all(isinstance(d, int) for d in shape[2:]):
            raise Unsupported("its output size is given, but that of its input is unknown")
        sizes = [int(d or 0) for d in shape[2:]]
        wanted = list(wanted)[-count:] if wanted is not None else [s * t for s, t in zip(sizes, strides, strict=True)]
        pads = convolution.transposed_pads(sizes, wanted, kernel, strides, dilations, extra, auto == "SAME_UPPER")
    return site.call(
        convolution.conv_transpose, site.tensor(0), site.tensor(1), site.optional(2), strides, pads, dilations, extra,
        site.attr("group", 1),
    )  # fmt: skip


@lowers("DeformConv")
def deform_conv(site: Site) -> Any:
    count = spatial_rank(site)
    if count != 2:
        raise Unsupported(f"over {count} axes")
    x, weight, offset = (site.tensor(i) for i in range(3))
    return site.call(
        convolution.deform_conv, x, weight, offset, site.optional(3), site.optional(4),
        listed(site, "strides", 2, 1), listed(site, "pads", 4, 0), listed(site, "dilations", 2, 1),
        site.attr("group", 1), site.attr("offset_group", 1),
    )  # fmt: skip

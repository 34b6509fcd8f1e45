"""Pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from xform.backends.torch_triton.functions import pooling
from xform.backends.torch_triton.lower.site import Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers
from xform.backends.torch_triton.operators.convolution import listed, padding, spatial_rank

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _window(site: Site) -> tuple[int, list[int], list[int], list[int], Any]:
    count = spatial_rank(site, 0)
    kernel = list(site.attr("kernel_shape"))
    strides, dilations = listed(site, "strides", count, 1), listed(site, "dilations", count, 1)
    return count, kernel, strides, dilations, padding(site, count, kernel, strides, dilations)


def _has_windows(site: Site, kernel: list[int], pads: list[int], dilations: list[int]) -> bool:
    """Whether at least one window fits, as far as the sizes are known: torch's own operators refuse to make nothing."""
    sizes = (site.shape() or ())[2:]
    spans = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, pads, dilations, strict=False)]
    return all(not isinstance(size, int) or size >= span for size, span in zip(sizes, spans, strict=False))


@lowers("MaxPool")
def max_pool(site: Site) -> Any:
    count, kernel, strides, dilations, pads = _window(site)
    ceil, indices = bool(site.attr("ceil_mode", 0)), site.wants(1)
    x = site.tensor()
    simple = (
        not isinstance(pads, str)
        and pads[:count] == pads[count:]
        and all(2 * p <= k for p, k in zip(pads, kernel, strict=False))
        and _has_windows(site, kernel, pads, dilations)
    )
    if simple and not indices and site.is_float() and count in _MAX:
        return site.call(_MAX[count], x, kernel, strides, pads[:count], dilations, ceil)
    how = kernel, strides, pads, dilations, ceil, indices, bool(site.attr("storage_order", 0))
    result = site.call(pooling.max_pool, x, *how)
    return site.pick(result, len(site.node.outputs))


@lowers("AveragePool")
def average_pool(site: Site) -> Any:
    count, kernel, strides, dilations, pads = _window(site)
    ceil, include = bool(site.attr("ceil_mode", 0)), bool(site.attr("count_include_pad", 0))
    x = site.tensor()
    simple = (
        not isinstance(pads, str)
        and pads[:count] == pads[count:]
        and dilations == [1] * count
        and all(2 * p <= k for p, k in zip(pads, kernel, strict=False))
        and _has_windows(site, kernel, pads, dilations)
    )
    if simple and count in _AVERAGE and not ceil:
        return site.call(_AVERAGE[count], x, kernel, strides, pads[:count], ceil, include)
    return site.call(pooling.average_pool, x, kernel, strides, pads, dilations, ceil, include)


@lowers("LpPool")
def lp_pool(site: Site) -> Any:
    _, kernel, strides, dilations, pads = _window(site)
    ceil = bool(site.attr("ceil_mode", 0))
    return site.call(pooling.lp_pool, site.tensor(), kernel, strides, pads, dilations, ceil, site.attr("p", 2))


@lowers("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(site: Site) -> Any:
    axes = list(range(2, site.demand_rank()))
    x = site.tensor()
    match site.node.op_type:
        case "GlobalAveragePool":
            return site.call(torch.mean, x, axes, True)
        case "GlobalMaxPool":
            return site.call(torch.amax, x, axes, True)
    return site.call(pooling.global_lp_pool, x, axes, site.attr("p", 2))


@lowers("MaxUnpool")
def max_unpool(site: Site) -> Any:
    count = spatial_rank(site, 0)
    kernel, strides = list(site.attr("kernel_shape")), listed(site, "strides", count, 1)
    pads = listed(site, "pads", 2 * count, 0)
    return site.call(pooling.max_unpool, site.tensor(0), site.tensor(1), kernel, strides, pads, site.ints(2))


@lowers("MaxRoiPool")
def max_roi_pool(site: Site) -> Any:
    raise Unsupported("torch has no pooling of regions by maximum")

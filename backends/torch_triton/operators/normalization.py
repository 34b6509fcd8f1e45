"""Normalizations. Statistics are taken in `stash_type` where the operator says so, in float32 at least."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from xform.backends.torch_triton.functions import normalization
from xform.backends.torch_triton.lower.site import Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers


@lowers("BatchNormalization", since=14)
def batch_norm(site: Site) -> Any:
    x, scale, bias, mean, variance = site.tensors()
    epsilon = site.attr("epsilon", 1e-5)
    if site.attr("training_mode", 0):
        result = site.call(
            normalization.batch_norm_training, x, scale, bias, mean, variance, epsilon, site.attr("momentum", 0.9)
        )
        return site.pick(result, len(site.node.outputs))
    return site.call(F.batch_norm, x, mean, variance, scale, bias, False, 0.0, epsilon)


@lowers("InstanceNormalization")
def instance_norm(site: Site) -> Any:
    return site.call(normalization.instance_norm, *site.tensors(), site.attr("epsilon", 1e-5))


@lowers("GroupNormalization", since=21)
def group_norm(site: Site) -> Any:
    x, scale, bias = site.tensors()
    return site.call(F.group_norm, x, site.attr("num_groups"), scale, bias, site.attr("epsilon", 1e-5))


def _normalized_shape(site: Site) -> list[Any] | None:
    """Trailing dims from `axis` on, if static."""
    rank, shape, axis = site.rank(), site.shape(), site.attr("axis", -1)
    scale = site.shape(1)
    if axis in (-1, (rank or 0) - 1) and scale is not None and len(scale) == 1 and isinstance(scale[0], int):
        last = shape[-1] if shape is not None else scale[0]
        return [scale[0]] if last == scale[0] or not isinstance(last, int) else None
    if rank is None or shape is None:
        return None
    dims = list(shape[axis % rank :])
    return dims if all(isinstance(d, int) for d in dims) and site.shape(1) == tuple(dims) else None


@lowers("LayerNormalization")
def layer_norm(site: Site) -> Any:
    x, scale, bias = site.tensor(0), site.tensor(1), site.optional(2)
    epsilon = site.attr("epsilon", 1e-5)
    dims = _normalized_shape(site)
    if dims is None or site.wants(1) or site.wants(2):
        result = site.call(normalization.layer_norm, x, scale, bias, site.attr("axis", -1), epsilon)
        return site.pick(result, len(site.node.outputs))
    return site.call(F.layer_norm, x, dims, scale, bias, epsilon)


@lowers("RMSNormalization")
def rms_norm(site: Site) -> Any:
    dims = _normalized_shape(site)
    epsilon = site.attr("epsilon", 1e-5)
    if dims is None:
        return site.call(normalization.rms_norm, site.tensor(), site.tensor(1), site.attr("axis", -1), epsilon)
    return site.call(F.rms_norm, site.tensor(), dims, site.tensor(1), epsilon)


@lowers("LRN")
def local_response_norm(site: Site) -> Any:
    how = site.attr("size"), site.attr("alpha", 1e-4), site.attr("beta", 0.75), site.attr("bias", 1.0)
    return site.call(normalization.local_response_norm, site.tensor(), *how)


@lowers("LpNormalization")
def lp_normalization(site: Site) -> Any:
    p = site.attr("p", 2)
    if p not in (1, 2):
        raise Unsupported(f"p = {p}")
    return site.call(normalization.lp_normalization, site.tensor(), site.attr("axis", -1), p)


@lowers("MeanVarianceNormalization")
def mean_variance(site: Site) -> Any:
    return site.call(normalization.mean_variance, site.tensor(), list(site.attr("axes", [0, 2, 3])))

"""Normalizations that torch has no single function for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def _stash(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def batch_norm_training(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    epsilon: float,
    momentum: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BatchNormalization on the batch's own statistics, and the running ones after it."""
    axes = [0, *range(2, x.ndim)]
    own_mean, own_variance = x.mean(axes), x.var(axes, unbiased=False)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    normed = (x - own_mean.reshape(shape)) / torch.sqrt(own_variance.reshape(shape) + epsilon)
    running = mean * momentum + own_mean * (1 - momentum), variance * momentum + own_variance * (1 - momentum)
    return normed * scale.reshape(shape) + bias.reshape(shape), *running


def instance_norm(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """InstanceNormalization, of single elements and of an empty batch too (where torch refuses)."""
    if x.numel() and x.shape[2:].numel() > 1:
        return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)
    return torch.zeros_like(x) + bias.reshape(1, -1, *[1] * (x.ndim - 2))


def layer_norm(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, axis: int, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNormalization over the axes from `axis` on: result, mean, 1 / standard deviation."""
    axes = list(range(axis % x.ndim, x.ndim))
    wide = _stash(x)
    mean = wide.mean(axes, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    result = (centred * inverse).to(x.dtype) * scale
    return (result if bias is None else result + bias), mean, inverse


def rms_norm(x: torch.Tensor, scale: torch.Tensor, axis: int, epsilon: float) -> torch.Tensor:
    """RMSNormalization over the axes from `axis` on."""
    axes = list(range(axis % x.ndim, x.ndim))
    wide = _stash(x)
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


def local_response_norm(x: torch.Tensor, size: int, alpha: float, beta: float, bias: float) -> torch.Tensor:
    """LRN: x / (bias + alpha / size * sum of squares of `size` channels around) ** beta."""
    before = (size - 1) // 2
    squares = F.pad(x.square(), [0, 0] * (x.ndim - 2) + [before, size - 1 - before])
    around = squares.unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * around) ** beta


def lp_normalization(x: torch.Tensor, axis: int, p: int) -> torch.Tensor:
    """x over its norm along `axis`; 0 where that is 0."""
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))


def mean_variance(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """(x - mean) / (standard deviation + 1e-9)."""
    mean = x.mean(list(axes), keepdim=True)
    deviation = (x.square().mean(list(axes), keepdim=True) - mean.square()).sqrt()
    return (x - mean) / (deviation + 1e-9)

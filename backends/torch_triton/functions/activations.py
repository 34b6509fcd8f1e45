"""Activations that torch has no function for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x (1 + erf(x / sqrt(2))) / 2.

    torch's own, but for float32 on a CPU: there its vectorized form takes erf from an approximation, by which GELU is
    off by up to 1.2e-6 (torch 2.13, around 3.5; ONNX Runtime 4.5e-7). By erfc it is 3.8e-7, as nothing cancels.
    """
    if x.dtype is not torch.float32 or x.is_cuda:
        return F.gelu(x)
    return 0.5 * x * torch.erfc(x * -math.sqrt(0.5))


def selu(x: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    """gamma (x if x > 0 else alpha (e^x - 1))."""
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


def swish(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


def prelu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """x where positive, slope x elsewhere."""
    return torch.where(x >= 0, x, slope * x)


def hard_sigmoid(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """clip(alpha x + beta, 0, 1)."""
    return (alpha * x + beta).clamp(0, 1)


def hardmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    """1 at the first maximum along `axis`, 0 elsewhere. A NaN is no maximum, as in ONNX Runtime; rows of NaN give 0."""
    where = torch.where(x.isnan(), -torch.inf, x).argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, where, (~x.gather(axis, where).isnan()).to(x.dtype))

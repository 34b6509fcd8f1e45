"""Activations that torch has no function for."""

from __future__ import annotations

import torch


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
    """1 at the first maximum along `axis`, 0 elsewhere."""
    where = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, where, 1)

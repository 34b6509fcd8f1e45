"""Windows of signal processing."""

from __future__ import annotations

import math

import torch


def cosine_sum(
    size: int, coefficients: tuple[float, float, float], periodic: bool, dtype: torch.dtype, like: torch.Tensor | None
) -> torch.Tensor:
    """a0 - a1 cos(2 pi n / N) + a2 cos(4 pi n / N), with N = size if periodic, else size - 1."""
    device = None if like is None else like.device
    n = torch.arange(size, dtype=torch.float64, device=device)
    angle = 2 * math.pi * n / (size if periodic else max(size - 1, 1))
    a0, a1, a2 = coefficients
    return (a0 - a1 * torch.cos(angle) + a2 * torch.cos(2 * angle)).to(dtype)

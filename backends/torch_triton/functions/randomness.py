"""Random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def _generator(seed: float | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


def draw(
    like: torch.Tensor | None,
    shape: Sequence[int] | None,
    normal: bool,
    first: float,
    second: float,
    dtype: torch.dtype,
    seed: float | None,
) -> torch.Tensor:
    """Normal numbers of mean `first` and deviation `second`, or uniform ones from `first` to `second`."""
    device = torch.device("cpu") if like is None else like.device
    size = list(shape) if shape is not None else list(like.shape) if like is not None else []
    generator = _generator(seed, device)
    if normal:
        return torch.randn(size, generator=generator, device=device, dtype=dtype) * second + first
    return torch.rand(size, generator=generator, device=device, dtype=dtype) * (second - first) + first


def bernoulli(p: torch.Tensor, dtype: torch.dtype, seed: float | None) -> torch.Tensor:
    """1 with probability p."""
    return torch.bernoulli(p, generator=_generator(seed, p.device)).to(dtype)


def multinomial(log_p: torch.Tensor, count: int, dtype: torch.dtype, seed: float | None) -> torch.Tensor:
    """Classes drawn from unnormalized logarithms of probabilities [batch, classes]."""
    p = torch.softmax(log_p, -1)
    return torch.multinomial(p, count, replacement=True, generator=_generator(seed, log_p.device)).to(dtype)


def dropout(
    x: torch.Tensor, training: torch.Tensor, ratio: torch.Tensor | float, seed: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout, and which elements were kept; in training the kept ones grow by 1 / (1 - ratio)."""
    rate = float(ratio)
    if not bool(training) or rate == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = torch.rand(x.shape, generator=_generator(seed, x.device), device=x.device) >= rate
    return torch.where(kept, x / (1 - rate), torch.zeros_like(x)), kept

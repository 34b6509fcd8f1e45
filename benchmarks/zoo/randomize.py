"""Random weights that hide nothing: no statistic, scale or bias at its neutral initial value."""

from __future__ import annotations

import torch


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every statistic and every parameter that starts as a constant a random value, in place.

    Freshly built networks have BatchNorm statistics (0, 1), gamma 1, beta 0, biases 0 and layer scales near 0. Folding
    and fusing mistakes vanish behind such values, and whole branches vanish behind a scale of 1e-6.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)

    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(uniform(buffer, -0.3, 0.3))
        elif name.endswith("running_var"):
            buffer.copy_(uniform(buffer, 0.6, 1.6))
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() < 2:
            continue
        first = float(parameter.flatten()[0])
        if not bool((parameter == first).all()):
            continue
        if abs(first) < 0.5:  # biases, offsets, tokens, layer scales, gates
            parameter.copy_(uniform(parameter, -0.2, 0.2))
        else:  # gains
            parameter.copy_(first * uniform(parameter, 0.7, 1.3))
    return model

"""What the kernel computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def residual_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    epsilon: float,
    is_rms: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual over the last axis, and the sum itself.

    Args:
        x, residual: [..., N], of one shape and dtype.
        weight, bias: [N]; RMS norm has no bias.
    """
    total = x + residual
    if is_rms:
        return F.rms_norm(total, [total.shape[-1]], weight, epsilon), total
    return F.layer_norm(total, [total.shape[-1]], weight, bias, epsilon), total

"""What the kernel computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bias_activation(x: torch.Tensor, bias: torch.Tensor, kind: str) -> torch.Tensor:
    """act(x + bias).

    Args:
        x: [..., N]; bias: [N].
        kind: "gelu", "gelu_tanh" or "silu".
    """
    total = x + bias
    if kind == "silu":
        return F.silu(total)
    return F.gelu(total, approximate="tanh" if kind == "gelu_tanh" else "none")

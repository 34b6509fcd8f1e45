"""What the kernel computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gated_unit(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up.

    Args:
        gate, up: [..., N], of one shape and dtype; halves of one packed product too.
        kind: "gelu", "gelu_tanh" or "silu".
    """
    if kind == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up

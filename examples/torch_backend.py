"""A block for the torch backend: readable, the same numbers, trainable, and in a file that torch reads safely.

python examples/torch_backend.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import xform
from xform.backends.torch_triton.lower import to_torch
from xform.backends.torch_triton.state import load_state


class Block(torch.nn.Module):
    """A gated MLP on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(16)
        self.gate, self.up = torch.nn.Linear(16, 32), torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x plus the gated MLP of its norm, [batch, 16]."""
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


def main() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(4, 16)
    fast = xform.optimize(model, backend="torch_triton", inputs=x, dynamic="auto")
    print(fast.artifact.module.code)
    print(f"largest difference {float((fast(x) - model(x)).abs().max().detach()):.1e}")

    gpu = xform.optimize(model, target="cuda", inputs=x, compile_only=True)
    print(f"kernels for a GPU: {gpu.artifact.metadata['lowered']}")

    with tempfile.TemporaryDirectory() as folder:
        (path,) = fast.save(Path(folder, "block.safetensors"))
        module = to_torch(load_state(path)).requires_grad_()
        module(x)[0].square().mean().backward()
        print(f"gradients of {sum(p.grad is not None for p in module.parameters())} parameters")


if __name__ == "__main__":
    main()

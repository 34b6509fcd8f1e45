"""What trains with branches and adapters runs as single layers: a RepVGG-type block and a LoRA-adapted layer.

    python examples/reparameterize.py

Both are plain modules with random weights, and nothing tells xform what they are: it reads from the graph that
everything between two nonlinearities is one affine map. The last part shows what is left alone, and why.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

import xform
from xform.optimized import OptimizedModule


class RepBlock(nn.Module):
    """3x3, 1x1 and identity, each with BatchNorm, added before a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.wide(x) + self.point(x) + self.skip(x))


class LoRALinear(nn.Module):
    """W x + b + s B A x."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.main = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.scale * self.up(self.down(x))


class ExpandThenPad(nn.Module):
    """A 1x1 convolution with a bias, then a 3x3 one that pads with zeros: at the border it sees zeros, not the bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.point, self.wide = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.point(x))


@torch.no_grad()
def trained(module: nn.Module) -> nn.Module:
    """Statistics and gains as after training: fresh ones are 0 and 1, and hide mistakes."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -0.5, 0.5)
            nn.init.uniform_(child.running_mean, -0.5, 0.5)
            nn.init.uniform_(child.running_var, 0.5, 2.0)
    return module.eval()


def show(title: str, module: nn.Module, x: torch.Tensor) -> None:
    """Optimize, and print operators, error and remarks."""
    plain = xform.optimize(module, inputs=x, passes=["propagate_constants", "raise_linear"])
    fast = xform.optimize(module, inputs=x)
    with torch.no_grad():
        error = (fast(x) - module(x)).abs().max().item()
    print(
        f"{title}\n  captured:  {operators(plain)}\n  optimized: {operators(fast)}\n  largest difference: {error:.1e}"
    )
    for remark in fast.report.remarks:
        if remark.pass_name == "merge_affine_maps" and remark.verdict == "missed":
            print(f"  left: {', '.join(remark.nodes)}: {remark.reason}")


def operators(optimized: OptimizedModule) -> str:
    """How many operators of each kind the canonical graph has."""
    counts = Counter(node.op_type for node in optimized.graph.graph)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))


def main() -> None:
    torch.manual_seed(0)
    show("RepVGG-type block", trained(RepBlock(16)), torch.randn(1, 16, 12, 12))
    show("LoRA", trained(LoRALinear(32, 4, 2.0)), torch.randn(3, 7, 32))
    show("1x1 then zero-padded 3x3", trained(ExpandThenPad(16)), torch.randn(1, 16, 12, 12))


if __name__ == "__main__":
    main()

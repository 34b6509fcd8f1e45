"""Tokens of very different sizes in int8: one scale for an activation, for each token, for 32 channels of a token.

python examples/int8_groups.py
"""

from __future__ import annotations

import torch

import xform
from xform.passes.integer import QuantizeStatic
from xform.pipeline.presets import INT8


class Mlp(torch.nn.Module):
    """A hidden layer, and a gate that makes some tokens a hundred times as large as others."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, width], size [batch, tokens, 1]; the result is of one size again."""
        return self.down(torch.nn.functional.gelu(self.up(x * size))) / size


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, every fifth of them large, with three channels that stand out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 64, 256, generator=generator)
    x[..., [5, 77, 130]] *= 20
    return x, torch.where(torch.arange(64) % 5 == 2, 100.0, 1.0)[None, :, None].expand(2, 64, 1)


def main() -> None:
    """Quantize three times without a search for what stays in float, compare, print."""
    torch.manual_seed(0)
    model, inputs = Mlp().eval(), batch(0)
    with torch.no_grad():
        expected = model(*inputs)
    errors = {}
    for label, one in {
        "one scale": QuantizeStatic(products="static", max_error=1.0),
        "a scale per token": QuantizeStatic(products="grouped", group=256, max_error=1.0),
        "a scale per 32 channels": QuantizeStatic(products="grouped", group=32, max_error=1.0),
    }.items():
        passes = [one if name == "quantize_products" else name for name in INT8]
        calibration = [batch(seed) for seed in (1, 2)]
        fast = xform.optimize(model, passes=passes, inputs=inputs, calibration=calibration, verify="off")
        errors[label] = float((fast(*inputs) - expected).norm() / expected.norm())
        print(f"{label}: relative error {errors[label]:.4f}")
    if list(errors.values()) != sorted(errors.values(), reverse=True):
        raise SystemExit("finer scales are not closer")


if __name__ == "__main__":
    main()

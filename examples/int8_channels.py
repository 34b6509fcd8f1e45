"""Channels of very different sizes, and channels far from zero, in int8: what calibration moves before it rounds.

python examples/int8_channels.py
"""

from __future__ import annotations

import torch

import xform
from xform.passes.integer import QuantizeStatic
from xform.pipeline.presets import INT8


class Mlp(torch.nn.Module):
    """Two layers with an activation function between.

    Args:
        size: Factor [hidden] that the first layer has in its channels and the second one takes out again.
        place: Bias [hidden] of the first layer: where the channels of the activation lie.
    """

    def __init__(self, size: torch.Tensor, place: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(256, len(size)), torch.nn.Linear(len(size), 256)
        with torch.no_grad():
            self.up.weight *= 2 * size[:, None]
            self.up.bias.copy_(place)
            self.down.weight /= size
            self.down.bias -= torch.nn.functional.silu(place) @ self.down.weight.T  # so that the result varies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, 256] of the same."""
        return self.down(torch.nn.functional.silu(self.up(x)))


def main() -> None:
    """Quantize with one scale for a tensor and with groups of channels, print what was moved and gained."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    size, alike, zero = torch.ones(1024), torch.ones(1024), torch.zeros(1024)
    size[::64] = 100.0
    batches = [torch.randn(2, 64, 256, generator=generator) for _ in range(4)]
    for label, one, model in (
        ("a few large channels", QuantizeStatic(products="static", max_error=0.015), Mlp(size, zero)),
        ("channels far from zero", QuantizeStatic(products="grouped", group=64, max_error=0.015), Mlp(alike, zero + 6)),
    ):
        passes = [one if name == "quantize_products" else name for name in INT8]
        fast = xform.optimize(model.eval(), passes=passes, inputs=batches[0], calibration=batches[1:], verify="off")
        with torch.no_grad():
            expected = model(batches[0])
        error = float((fast(batches[0]) - expected).norm() / expected.norm())
        moved = next(remark for remark in fast.report.remarks if remark.rule == "migration")
        print(f"{label}: relative error {error:.4f}\n  {moved.reason}")
        if error > 0.05:
            raise SystemExit("nothing was gained")


if __name__ == "__main__":
    main()

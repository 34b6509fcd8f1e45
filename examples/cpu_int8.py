"""An encoder in int8, calibrated on a few batches, and the same one without work on padding.

python examples/cpu_int8.py
"""

from __future__ import annotations

import torch

import xform


class Encoder(torch.nn.Module):
    """Two attention layers with a key-padding mask, as sentence encoders have them."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))
        self.out = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.norm = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] of the same, and a mask [batch, tokens] that is 0 at padding."""
        bias = torch.where(mask[:, None, None, :] > 0, 0.0, -1e9)
        for qkv, out, norm in zip(self.qkv, self.out, self.norm, strict=True):
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = norm(x + out(attended.transpose(1, 2).flatten(2)))
        return x


def batch(seed: int, size: int = 8, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (size, 1), generator=generator)
    return torch.randn(size, tokens, 128, generator=generator), (torch.arange(tokens)[None] < lengths).long()


def main() -> None:
    """Optimize twice, compare, print."""
    torch.manual_seed(0)
    model = Encoder().eval()
    x, mask = batch(0)
    with torch.no_grad():
        expected = model(x, mask)

    quantized = xform.optimize(model, preset="int8", inputs=(x, mask), calibration=[batch(seed) for seed in (1, 2)])
    error = float((quantized(x, mask) - expected).norm() / expected.norm())
    print(quantized.explain("int8").splitlines()[-1].strip())
    print(f"int8: relative error {error:.3f}")

    packed = xform.optimize(model, padding="packed", inputs=(x, mask))
    print(packed.explain("padding").splitlines()[-1].strip())
    valid = mask.bool()
    difference = float((packed(x, mask) - expected)[valid].abs().max())
    print(f"packed: {float(valid.float().mean()):.0%} of the positions are tokens, largest difference {difference:.1e}")
    if error > 0.1 or difference > 1e-4:
        raise SystemExit("the result is wrong")


if __name__ == "__main__":
    main()

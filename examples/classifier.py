"""A classifier reads one token, so the last block is computed for that token alone.

python examples/classifier.py
"""

from __future__ import annotations

import torch

import xform
from xform.pipeline.presets import EXACT

BLOCKS, WIDTH = 4, 128


class Classifier(torch.nn.Module):
    """Pre-norm transformer blocks; ten classes from the first token."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = torch.nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 10] of tokens [batch, length, 128]."""
        logits: torch.Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits


def main() -> None:
    """Optimize with and without the pass, compare, print."""
    torch.manual_seed(0)
    model, tokens = Classifier().eval(), torch.randn(1, 64, WIDTH)
    fast = xform.optimize(model, inputs=tokens)
    whole = xform.optimize(model, inputs=tokens, passes=[one for one in EXACT if one != "eliminate_unread_rows"])
    print("\n".join(fast.explain("rows").splitlines()[1:]))
    all_rows, read = whole.report.after.flops, fast.report.after.flops
    print(f"{read / 1e6:.1f} million operations, {all_rows / 1e6:.1f} with rows that nobody reads")
    with torch.no_grad():
        difference = float((fast(tokens) - model(tokens)).abs().max())
    print(f"largest difference {difference:.1e}")
    if difference > 1e-4 or not read < all_rows:
        raise SystemExit("the result is wrong")


if __name__ == "__main__":
    main()

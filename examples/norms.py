"""A small pre-norm transformer: its residual stream, its LayerNorms as RMSNorms, and its norms ready for int8.

    python examples/norms.py

Nothing is downloaded. Weights are random, with scales and biases that are not ones and zeros.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from xform.capture import capture_torch
from xform.graph.stream_view import draw
from xform.graph.streams import find_streams
from xform.passes.normalize import LayerWiseScales
from xform.pipeline.calibration import norm_ranges
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve
from xform.report.concepts import count_concepts

TOKENS, WIDTH = 100, 64


class Block(torch.nn.Module):
    """A pre-norm feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        written: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + written


def build() -> torch.nn.Module:
    """Embedding, three blocks, a final norm and a head."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    model = torch.nn.Sequential(
        torch.nn.Embedding(TOKENS, WIDTH), *blocks, torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, TOKENS)
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model.eval()


def main() -> int:
    ids = torch.randint(0, TOKENS, (2, 16))
    captured = capture_torch(build(), (ids,), {})
    canonical = run_pipeline(captured.model, resolve("exact")).model
    print(draw(find_streams(canonical.graph)))

    names = ["layer_norm_to_rms_norm", "absorb_norm_affine", "remove_dead_code"]
    result = run_pipeline(canonical, resolve(passes=names))
    before, after = count_concepts(canonical), count_concepts(result.model)
    print(f"layer norms {before.get('layer_norm', 0)} -> {after.get('layer_norm', 0)}, rms norms {after['rms_norm']}")
    print(f"verified: {result.verification.state}, relative error {result.verification.max_rel_error:.1e}")

    name = canonical.graph.inputs[0].name or ""
    batches = [{name: np.random.default_rng(seed).integers(0, TOKENS, (2, 16))} for seed in range(4)]
    scaled = run_pipeline(canonical, [LayerWiseScales(norm_ranges(canonical, batches))])
    for node in scaled.model.graph:
        if "xform.scale" in node.metadata_props:
            scale, zero = (node.metadata_props[f"xform.{key}"] for key in ("scale", "zero_point"))
            print(f"{node.op_type}: one scale {float(scale):.4f} and zero point {zero} for all {WIDTH} channels")
    return 0 if result.verification.ok and scaled.verification.ok and not after.get("layer_norm") else 1


if __name__ == "__main__":
    sys.exit(main())

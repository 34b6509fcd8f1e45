"""The judge of benchmarks/reparam.py: what it computes in float64 agrees with torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from xform.capture import capture_torch
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve


@pytest.fixture(scope="module")
def float64() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "zoo" / "float64.py"
    spec = importlib.util.spec_from_file_location("zoo_float64", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo_float64"] = module
    spec.loader.exec_module(module)
    return module


class Attends(nn.Module):
    """Attention with a mask over four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        return nn.functional.scaled_dot_product_attention(y, x, y, attn_mask=mask)


CASES = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=(2, 1), groups=2), (2, 4, 9, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv3d": (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (1, 2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (1, 4, 5, 4)),
    "average": (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), (1, 3, 7, 8)),
    "average of what counts": (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (1, 3, 7, 8)),
    "max": (nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), (1, 3, 8, 7)),
    "norm": (nn.BatchNorm2d(3), (2, 3, 4, 5)),
    "gelu": (nn.GELU(), (3, 4)),
    "hard": (nn.Sequential(nn.Hardswish(), nn.Hardsigmoid()), (3, 4)),
    "attention": (Attends(), (2, 3, 5, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name: str, float64: ModuleType) -> None:
    torch.manual_seed(0)
    module, shape = CASES[name]
    module = module.double().eval()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    x = torch.randn(*shape, dtype=torch.float64)
    captured = capture_torch(module, (x,)).model
    optimized = run_pipeline(captured, resolve("exact"), verify="off").model
    feeds = {captured.graph.inputs[0].name or "": x.numpy()}
    with torch.no_grad():
        expected = module(x).numpy()
    for model in (captured, optimized):
        np.testing.assert_allclose(float64.evaluate(model, feeds)[0], expected, rtol=1e-11, atol=1e-11)


def test_what_a_model_computes_in_float32_is_judged_in_float64(float64: ModuleType) -> None:
    class Narrow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.float() @ x.float().transpose(-1, -2)).to(x.dtype)

    x = torch.from_numpy(np.random.default_rng(7).standard_normal((2, 5, 64)))
    captured = capture_torch(Narrow(), (x,)).model
    got = float64.evaluate(captured, {captured.graph.inputs[0].name: x.numpy()})[0]
    expected = (x @ x.transpose(-1, -2)).numpy()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)

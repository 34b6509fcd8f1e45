"""Parallel attention branches: joined head by head, or merged where their projections are summed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from xform.backends.torch_triton.lower import to_torch
from xform.capture import capture_torch
from xform.pipeline.presets import resolve
from xform.rewrite.passes import PassContext


class Attention(nn.Module):
    def __init__(self, width=32, heads=4, size=8, scale=None, causal=False):
        super().__init__()
        self.q, self.v = nn.Linear(width, heads * size), nn.Linear(width, heads * size)
        self.k, self.o = nn.Linear(width, heads * size, bias=False), nn.Linear(heads * size, width)
        self.heads, self.size, self.options = heads, size, {"scale": scale, "is_causal": causal}

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, **self.options)
        return self.o(attended.transpose(1, 2).reshape(batch, length, self.heads * self.size))


class Parallel(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.norm, self.branches = nn.LayerNorm(32), nn.ModuleList(branches)

    def forward(self, x):
        y = self.norm(x)
        for branch in self.branches:
            x = x + branch(y)
        return x


class SummedProjections(nn.Module):
    """Joined at the inputs of the softmax: Q, K and V are sums of two projections, and so is the output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Attention(), Attention()

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (
            (f(x) + g(x)).view(batch, length, 4, 8).transpose(1, 2)
            for f, g in ((self.a.q, self.b.q), (self.a.k, self.b.k), (self.a.v, self.b.v))
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 32)
        return self.a.o(attended) + self.b.o(attended)


def optimized(module, length=5):
    torch.manual_seed(7)
    module = module.double().eval()
    x = torch.randn(2, length, 32, dtype=torch.float64)
    model = capture_torch(module, (x,), dynamic="auto").model
    context = PassContext()
    for one in resolve():
        one.run(model, context)
    with torch.no_grad():
        for probe in (x, torch.randn(3, length + 2, 32, dtype=torch.float64)):
            error = (to_torch(model)(probe)[0] - module(probe)).abs().max()
            assert float(error) < 1e-10
    reasons = [r.reason for r in context.remarks if r.verdict == "missed" and r.rule == "join_attention"]
    return Counter(n.op_type for n in model.graph), reasons


@pytest.mark.parametrize("causal", [False, True])
def test_branches_over_one_value_become_one_attention_with_all_heads(causal):
    torch.manual_seed(1)
    count, _ = optimized(
        Parallel(Attention(causal=causal), Attention(heads=2, causal=causal), Attention(causal=causal))
    )
    assert count["Attention"] == 1
    assert count["MatMul"] == 4


def test_summed_projections_merge():
    torch.manual_seed(2)
    count, _ = optimized(SummedProjections())
    assert count["Attention"] == 1
    assert count["MatMul"] == 4


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Attention(heads=2, size=16), "heads of different sizes"),
        (Attention(scale=0.5), "different scales"),
        (Attention(causal=True), "different scales or settings"),
    ],
)
def test_different_branches_stay_and_say_why(other, reason):
    torch.manual_seed(3)
    count, reasons = optimized(Parallel(Attention(), other))
    assert count["Attention"] == 2
    assert any(reason in text for text in reasons), reasons

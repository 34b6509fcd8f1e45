"""Configurations of kernels: all of them compute the same, and without a GPU the first one is taken."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib

from xform.backends.torch_triton.kernels import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
X, Y, VECTOR = (torch.randn(*shape, device=DEVICE) for shape in ((2, 600), (2, 600), (600,)))
HEADS, TABLE = torch.randn(1, 2, 3, 24, device=DEVICE), torch.randn(1, 3, 12, device=DEVICE)
CALLS = {
    "residual_norm": (X, Y, VECTOR, VECTOR, 1e-5, False),
    "gated_unit": (X, Y, "gelu"),
    "bias_activation": (X, VECTOR, "silu"),
    "rotary_qk": (HEADS, HEADS[:, :1], TABLE, TABLE, True),
}


def configurations(name: str) -> list[object]:
    return list(importlib.import_module(f"xform.backends.torch_triton.kernels.{name}.kernel").CONFIGURATIONS)


def test_every_triton_kernel_is_tuned() -> None:
    assert {name for name, kernel in kernels().items() if kernel.tuner is not None} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_all_configurations_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, declared = kernels()[name], configurations(name)
    assert len({str(one) for one in declared}) == len(declared) > 1
    want = kernel.naive(*CALLS[name])
    for configuration in declared:
        monkeypatch.setattr(kernel.tuner, "configs", [configuration])
        got = kernel.op(*CALLS[name])
        for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU measures")
@pytest.mark.parametrize("name", CALLS)
def test_without_a_gpu_the_first_configuration_is_taken(name: str) -> None:
    tuner = kernels()[name].tuner
    assert [str(one) for one in tuner.configs] == [str(configurations(name)[0])] and not tuner.cache_results


PROGRAM = """
import os
import torch
from torch._dynamo.backends.common import aot_autograd
here = torch.cuda.is_available
torch.cuda.is_available = lambda: True  # as a machine with a GPU declares the kernels
from xform.backends.torch_triton.kernels import kernels
tuners = {name: kernel.tuner for name, kernel in kernels().items() if kernel.tuner is not None}
torch.cuda.is_available = here
assert all(len(tuner.configs) > 1 and tuner.cache_results for tuner in tuners.values())

class Block(torch.nn.Module):
    def forward(self, x, r, w):
        normed, stream = torch.ops.xform.residual_norm(x, r, w, None, 1e-6, True)
        return torch.ops.xform.gated_unit(normed, stream, "silu")

def inspect(graph, inputs):
    print(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes), flush=True)
    os._exit(0)  # the kernels cannot run here

x = torch.randn(2, 5, 8)
compiled = torch.compile(Block(), backend=aot_autograd(fw_compiler=inspect))
with torch.no_grad():
    compiled(x, x, torch.ones(8))
"""


def test_tuned_kernels_are_captured_with_all_configurations() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"

"""benchmarks/torch_devices.py: a sample, and that it tells what is on another device or waits for numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch_devices

    return torch_devices


def test_a_sample_is_clean() -> None:
    only = "test_(layer_norm|rms_norm|gelu|softmax|matmul|conv_with|attention_3d|reduce_|resize_.*sizes|gather_)"
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "torch_devices.py"), "--json", "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mixed"] == {} and found["clean"] > 100


class Mixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x + torch.ones(3)]


class Elsewhere(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x + 1, torch.ones(3)]


class Waiting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x * x.sum().item()]


class Copying(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x + torch.tensor([1.0, 2.0, 3.0], device=x.device)]


class Clean(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.linear(x) + torch.arange(3, device=x.device)]


@pytest.mark.parametrize(
    ("module", "state"),
    [(Mixed, "mixed"), (Elsewhere, "mixed"), (Waiting, "waits"), (Copying, "waits"), (Clean, "clean")],
)
def test_what_is_told(module: type[torch.nn.Module], state: str, devices: Any) -> None:
    found, reason = devices.examine(module(), [torch.ones(3)])
    assert found == state and bool(reason) is (state != "clean")

"""All that is decided at the first run on a GPU, in its order, with a clock and a recorder in place of the GPU's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled for the GPU here, and these tests run on the CPU", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")

import xform
from xform.backends.base import LowerOptions
from xform.backends.torch_triton import TorchTritonBackend, cuda_graphs, packing, runner
from xform.backends.torch_triton.kernels import kernels
from xform.target import Target


class Model(torch.nn.Module):
    """Patches, attention with queries, keys and values apart, and a gated unit; every number is random."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = torch.nn.Conv2d(3, 16, 4, 4)
        self.q, self.k, self.v, self.out = (torch.nn.Linear(16, 16) for _ in range(4))
        self.norm = torch.nn.LayerNorm(16)
        self.gate, self.up, self.down = (torch.nn.Linear(*s, bias=False) for s in ((16, 32), (16, 32), (32, 16)))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        heads = [layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        x = self.norm(x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def clock(function: Any, arguments: tuple[Any, ...]) -> float:
    """Kernels and packed products are faster than torch and products apart."""
    fast = [packing._packed, *(kernel.op for kernel in kernels().values())]
    return 0.5 if any(function is one for one in fast) else 1.0


def recorder(module: Any, buffers: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Replays by running again into the same outputs."""
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
    outputs = [output.clone() for output in module(*buffers)]

    def replay() -> None:
        for held, new in zip(outputs, module(*buffers), strict=True):
            held.copy_(new)

    return replay, outputs


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each module that was timed as a whole had kernels in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runner, "recorded_seconds", clock)
    monkeypatch.setattr(cuda_graphs, "record_cuda_graph", recorder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    readings = iter([1.0, 0.5, 2.0, 1.0])  # channels first, last; then without and with torch.compile
    real, timed = runner._seconds, []

    def seconds(call: Any, *arguments: Any) -> float:
        timed.append("ops.xform" in call._module.code)
        real(call, *arguments)
        return next(readings)

    monkeypatch.setattr(runner, "_seconds", seconds)
    return timed


@pytest.mark.parametrize("compile_mode", ["off", "inductor"])
def test_layout_products_kernels_recording(
    pretended: list[bool], compile_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = Model().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want = model(image)
    given: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: (given.append(module.code), module)[1])
    graph = xform.optimize(model, inputs=image, backend="torch_triton").artifact.model
    lowered = TorchTritonBackend().lower(graph, Target("cuda"), LowerOptions(compile=compile_mode))
    assert lowered.metadata["lowered"] == {"gated_unit": 1, "linear": 4, "residual_norm": 1}
    lowered.target = Target("cpu")
    run = runner.TorchRunner(lowered)
    run._device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr(run, "_tensor_of", lambda value: value)
    for _ in range(2):
        torch.testing.assert_close(run.run({"image": image})[0], want, rtol=1e-4, atol=1e-4)
    call, told = run._call, dict(lowered.metadata)
    assert pretended == ([False, False] if compile_mode == "off" else [False, False, True, False])
    assert told["layout"]["chosen"] == "channels_last"
    assert sorted((len(line["widths"]), line["packed"]) for line in told["products"]) == [(2, True), (3, True)]
    assert {line["kernel"]: line["keep"] for line in told["kernels"]} == {"gated_unit": True, "residual_norm": True}
    assert {choice.rule for choice in lowered.choices if choice.applied} == {
        "linear", "channels_last", "packed_products", "gated_unit", "residual_norm"
    }  # fmt: skip
    assert isinstance(call, cuda_graphs.Replayer) and call.refused is None
    again = runner.TorchRunner(lowered)  # the module is as it was left, and what was found stays said
    again._device = run._device
    again._chosen([image]) if compile_mode == "off" else None
    assert {key: lowered.metadata[key] for key in ("layout", "products", "kernels")} == {
        key: told[key] for key in ("layout", "products", "kernels")
    }
    if compile_mode == "inductor":
        assert told["compile"]["chosen"] == "inductor"
        assert "ops.xform" not in given[0] and given[0].count("split(") == 2

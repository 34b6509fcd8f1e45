"""A kernel is kept where it is faster than torch, and the decision is remembered."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled for the GPU here, and these tests run on the CPU", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")

from support import floats, parse

from xform.backends.torch_triton.choose import CACHE, FILE, as_choices, choose, settled, torch_alone, wall_seconds
from xform.backends.torch_triton.fuse import counts, fuse
from xform.backends.torch_triton.kernels import kernels
from xform.backends.torch_triton.lower import to_torch
from xform.errors import XformWarning

TEXT = """g (float[2,3,8] x, float[2,3,8] r, float[8] w) => (float[2,3,8] z) {
    s = Add(x, r) n = RMSNormalization(s, w) e = Sigmoid(n) f = Mul(n, e) z = Mul(f, s) }"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def module_and_inputs() -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    module = to_torch(parse(TEXT, {"w": floats(8)}))
    assert counts(fuse(module)) == {"gated_unit": 1, "residual_norm": 1}
    return module, [torch.from_numpy(floats(2, 3, 8)) for _ in range(2)]


class Clock:
    """Says that the kernel of one name is fast and others are slow."""

    def __init__(self, fast: str) -> None:
        self.fast, self.calls = fast, 0

    def __call__(self, function: Any, arguments: tuple[Any, ...]) -> float:
        self.calls += 1
        ours = [kernel for kernel in kernels().values() if kernel.op is function]
        return 1.0 if not ours else 0.5 if ours[0].name == self.fast else 0.99


def test_what_gains_nothing_goes_back_to_torch() -> None:
    module, inputs = module_and_inputs()
    want = module(*inputs)[0]
    lines = choose(module, inputs, Clock("residual_norm"))
    assert {line["kernel"]: line["keep"] for line in lines} == {"residual_norm": True, "gated_unit": False}
    assert "ops.xform.residual_norm" in module.code and "ops.xform.gated_unit" not in module.code
    torch.testing.assert_close(module(*inputs)[0], want)


def test_decisions_are_remembered_by_shape() -> None:
    module, inputs = module_and_inputs()
    choose(module, inputs, Clock("residual_norm"))
    assert len(json.loads((CACHE.path / FILE).read_text())) == 2
    again, clock = module_and_inputs()[0], Clock("gated_unit")
    choose(again, inputs, clock)
    assert clock.calls == 0 and again.code == module.code


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1, 2]",
        "[" * 100_000,
        '{"some call": 3}',
        '{"some call": {"keep": "yes", "kernel_seconds": 1.0, "torch_seconds": 1.0}}',
        '{"some call": {"keep": true, "kernel_seconds": NaN, "torch_seconds": 1.0}}',
        '{"some call": {"keep": true, "kernel_seconds": 1.0}}',
        '{"some call": {"packed": true, "kernel_seconds": 1.0, "torch_seconds": 1.0}}',
    ],
)
def test_a_broken_cache_is_measured_again(content: str) -> None:
    CACHE.path.mkdir(parents=True)
    (CACHE.path / FILE).write_text(content)
    module, inputs = module_and_inputs()
    with pytest.warns(XformWarning, match="timings of kernels in kernels/kernels.json are ignored"):
        assert len(choose(module, inputs, wall_seconds)) == 2
    assert len(json.loads((CACHE.path / FILE).read_text())) == 2


def test_what_was_measured_is_said_about_each_place() -> None:
    module, inputs = module_and_inputs()
    found = as_choices(choose(module, inputs, Clock("residual_norm")))
    kept, left = sorted(found, key=lambda choice: not choice.applied)
    assert (kept.rule, kept.applied, kept.concept) == ("residual_norm", True, "rms_norm") and len(kept.nodes) == 2
    assert (left.rule, left.applied, left.concept) == ("gated_unit", False, "silu")
    assert "gains nothing" in left.reason and "2x3x8" in left.reason and "gains" not in kept.reason


def test_a_kernel_that_does_not_compile_leaves_torch_and_is_said() -> None:
    from triton.runtime.errors import OutOfResources

    class Small(Clock):
        def __call__(self, function: Any, arguments: tuple[Any, ...]) -> float:
            if super().__call__(function, arguments) == 0.5:
                raise OutOfResources(300000, 232448, "shared memory")
            return 1.0

    module, inputs = module_and_inputs()
    lines = choose(module, inputs, Small("gated_unit"))
    (failed,) = [line for line in lines if "failed" in line]
    assert (failed["kernel"], failed["keep"]) == ("gated_unit", False) and "shared memory" in failed["failed"]
    assert "ops.xform.gated_unit" not in module.code
    (told,) = [choice for choice in as_choices(lines) if choice.rule == "gated_unit"]
    assert not told.applied and "does not run" in told.reason and "shared memory" in told.reason
    again, clock = module_and_inputs()[0], Clock("gated_unit")
    choose(again, inputs, clock)
    assert clock.calls > 0  # it may run with other versions


def test_a_kernel_that_cannot_be_launched_is_not_run_by_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from xform.backends.torch_triton.packing import pack

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OutOfResources(300000, 232448, "shared memory")

    text = """g (float[2,3,8] x, float[2,3,8] r, float[8] n, float[8,8] w, float[8,8] v) => (float a, float b) {
        s = Add(x, r) y = RMSNormalization(s, n) t = MatMul(y, w) u = MatMul(y, v) a = Relu(t) b = Abs(u) }"""
    module = to_torch(parse(text, {"n": floats(8), "w": floats(8, 8), "v": floats(8, 8)}))
    inputs = [torch.from_numpy(floats(2, 3, 8)) for _ in range(2)]
    want = module(*inputs)
    assert counts(fuse(module)) == {"residual_norm": 1}
    monkeypatch.setattr(kernels()["residual_norm"].tuner, "run", refuse)
    assert len(pack(module, inputs, wall_seconds)) == 1
    (line,) = choose(module, inputs, wall_seconds)
    assert "shared memory" in line["failed"] and "ops.xform" not in module.code
    for got, wanted in zip(module(*inputs), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_another_way_of_timing_is_another_decision() -> None:
    def quick(function: Any, arguments: tuple[Any, ...]) -> float:
        return 1.0

    module, inputs = module_and_inputs()
    choose(module, inputs, Clock("residual_norm"))
    choose(module_and_inputs()[0], inputs, quick)
    assert len(json.loads((CACHE.path / FILE).read_text())) == 4


@pytest.mark.parametrize("activation", ["Gelu", 'Gelu <approximate = "tanh">'])
def test_a_bias_goes_back_into_its_product(activation: str) -> None:
    body = f"m = MatMul(x, w) s = Add(m, b) z = {activation}(s)"
    text = f"g (float[2,3,8] x, float[8,4] w, float[4] b) => (float[2,3,4] z) {{ {body} }}"
    module = to_torch(parse(text, {"w": floats(8, 4), "b": floats(4)}))
    x = torch.from_numpy(floats(2, 3, 8))
    want = module(x)[0]
    assert counts(fuse(module)) == {"bias_activation": 1}
    choose(module, [x], Clock("none"))
    assert "linear" in module.code and "bias_activation" not in module.code and "matmul" not in module.code
    torch.testing.assert_close(module(x)[0], want)


def test_a_compiler_gets_the_module_without_kernels() -> None:
    module, inputs = module_and_inputs()
    code = module.code
    alone = torch_alone(module)
    assert "ops.xform" not in alone.code and "ops.xform" in code == module.code
    torch.testing.assert_close(alone(*inputs)[0], module(*inputs)[0])
    shared = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    assert shared == {name: tensor.data_ptr() for name, tensor in alone.state_dict().items()} != {}


def test_uses_are_said_once() -> None:
    """Those that will be measured are said then; where nothing runs, they are said at once."""
    found = fuse(to_torch(parse(TEXT, {"w": floats(8)})))
    assert settled(found, runs_here=True) == []
    assert {choice.rule for choice in settled(found, runs_here=False) if choice.applied} == {
        "residual_norm",
        "gated_unit",
    }

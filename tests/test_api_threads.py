"""Several threads: one capture, right results, a module that nobody touched; and a forked process."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import xform
from xform.optimized import OptimizedModule

THREADS = 8


class Net(nn.Module):
    """Batch statistics, a mode, a counter that forward writes, and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.last: torch.Tensor | None = None
        with torch.no_grad():
            for tensor in (self.linear.weight, self.linear.bias, self.norm.weight, self.norm.bias):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            self.norm.running_mean.copy_(torch.randn(5, generator=generator))
            self.norm.running_var.copy_(torch.rand(5, generator=generator) + 0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.calls += 1
        self.last = self.drop(torch.relu(self.norm(self.linear(x)))) * scale
        return self.last


def state_of(module: nn.Module) -> list[Any]:
    """Everything of a module that a capture could touch: objects, values, flags, attributes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [
        [(name, id(t), type(t), t.dtype, t.device, t.requires_grad, t._version, t.tolist()) for name, t in tensors],
        [(name, id(child), child.training) for name, child in module.named_modules()],
        {name: id(value) for name, value in vars(module).items()},
    ]


def reference(module: nn.Module, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    import copy

    with torch.no_grad():
        return copy.deepcopy(module).eval()(x, scale)


def in_threads(call: Any, jobs: list[Any]) -> list[Any]:
    barrier = threading.Barrier(THREADS)

    def run(index: int) -> list[Any]:
        barrier.wait()
        return [(job, call(*job)) for job in jobs[index::THREADS]]

    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")
        return [pair for found in pool.map(run, range(THREADS)) for pair in found]


def test_first_call_and_recapture_in_eight_threads() -> None:
    module = Net()
    module.norm.eval()  # flags differ from child to child
    before = state_of(module)
    fast = xform.optimize(module)
    assert isinstance(fast, OptimizedModule)
    generator = torch.Generator().manual_seed(1)
    jobs = [(torch.randn(3 + i % 4, 6, generator=generator), 1.0 + i % 2) for i in range(64)]
    for (x, scale), output in in_threads(fast, jobs):
        torch.testing.assert_close(output, reference(module, x, scale), rtol=1e-5, atol=1e-5)
    assert fast.captures == 2  # one per scale, however many threads asked
    assert state_of(module) == before


def test_the_users_module_runs_in_another_thread_during_a_capture() -> None:
    module = Net().eval()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    expected = reference(module, x)
    done = threading.Event()
    wrong: list[Any] = []

    def keep_running() -> None:
        with torch.no_grad():
            while not done.is_set():
                output = module(x)
                if type(output) is not torch.Tensor or not torch.equal(output, expected):
                    wrong.append(output)

    thread = threading.Thread(target=keep_running)
    thread.start()
    try:
        fast = xform.optimize(module, inputs=x)
    finally:
        done.set()
        thread.join()
    assert not wrong
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)


def test_what_other_threads_print_during_a_capture_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from xform.capture.quiet import quiet

    with quiet():
        print("mine")
        thread = threading.Thread(target=print, args=("theirs",))
        thread.start()
        thread.join()
    assert capsys.readouterr().out == "theirs\n"


def test_openvino_runs_calls_side_by_side() -> None:
    pytest.importorskip("openvino")
    module = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    generator = torch.Generator().manual_seed(4)
    xs = [(torch.randn(3, 6, generator=generator),) for _ in range(200)]
    fast = xform.optimize(module, inputs=xs[0], backend="openvino")
    for (x,), output in in_threads(fast, xs):
        torch.testing.assert_close(output, reference_of(module, x), rtol=1e-4, atol=1e-5)


def reference_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def _child(fast: Any, x: torch.Tensor, queue: Any) -> None:
    queue.put([fast(x).tolist(), fast(torch.cat([x, x])).tolist()])


@pytest.mark.parametrize("backend", ["onnxruntime", "torch_triton"])
def test_a_forked_child_loads_and_captures_again(backend: str) -> None:
    module = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    fast = xform.optimize(module, inputs=x, backend=backend)
    fast(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(fast, x, queue))
    child.start()
    try:
        once, twice = queue.get(timeout=120)
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()
    torch.testing.assert_close(torch.tensor(once), reference_of(module, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(twice)[:3], reference_of(module, x), rtol=1e-5, atol=1e-5)

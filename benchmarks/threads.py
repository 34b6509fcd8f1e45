"""Threads at the first call of an optimized module and at its second capture, many times over.

    python benchmarks/threads.py --json [--rounds 200] [--threads 8]

Every round makes a module, optimizes it without inputs, and calls it from all threads at once: first with one plain
value, then with another, which asks for a second capture. The results are compared, and the module with what it was
before: objects, values, dtypes, devices, training flags, versions.

Exit code 0 if nothing was wrong, else 1. The last line is a JSON object: rounds, threads, calls, wrong, raised, touched
(modules that were changed), captures (two per round are right), seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

import xform


class Net(nn.Module):
    """Batch statistics, dropout, and a counter that forward writes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean, self.norm.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.calls += 1
        return self.drop(torch.relu(self.norm(self.linear(x)))) * scale


def state_of(module: nn.Module) -> list[Any]:
    """Everything of a module that a capture could touch."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    facts = [(n, id(t), type(t), t.dtype, t.device, t.requires_grad, t._version, t.tolist()) for n, t in tensors]
    return [*facts, *((name, id(child), child.training) for name, child in module.named_modules())]


def one_round(seed: int, threads: int) -> dict[str, int]:
    """Wrong results, exceptions, changed modules and captures of one round."""
    module = Net(seed)
    module.norm.eval()
    reference = copy.deepcopy(module).eval()
    before = state_of(module)
    fast: Any = xform.optimize(module)
    found = {"wrong": 0, "raised": 0}
    barrier = threading.Barrier(threads)

    def call(index: int) -> None:
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1000 * seed + index))
        for scale in (1.0, 2.0):
            barrier.wait()
            try:
                output = fast(x, scale)
            except Exception as error:  # counted; the benchmark is about whatever may happen
                print(f"round {seed}: {type(error).__name__}: {error}", file=sys.stderr)
                found["raised"] += 1
                continue
            with torch.no_grad():
                expected = reference.drop(torch.relu(reference.norm(reference.linear(x)))) * scale
            found["wrong"] += not torch.allclose(output, expected, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, range(threads)))
    return {**found, "touched": int(state_of(module) != before), "captures": fast.captures}


def main() -> int:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="accepted, as every benchmark does; the line comes always")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    total = {"wrong": 0, "raised": 0, "touched": 0, "captures": 0}
    for seed in range(options.rounds):
        for name, count in one_round(seed, options.threads).items():
            total[name] += count
    ok = not (total["wrong"] or total["raised"] or total["touched"]) and total["captures"] == 2 * options.rounds
    result = {"rounds": options.rounds, "threads": options.threads, "calls": 2 * options.rounds * options.threads}
    print(json.dumps({**result, **total, "ok": ok, "seconds": round(time.perf_counter() - start, 1)}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

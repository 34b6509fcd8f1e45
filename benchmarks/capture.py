"""Capture every kind of architecture: the smallest variant of every timm family, and 30 and more transformers types.

    python benchmarks/capture.py --json [--only REGEX] [--jobs N] [--resume FILE]

Every architecture runs in a process of its own, with random weights, and goes through these steps, each timed:

    eager      the module itself, in evaluation mode
    export     torch.export alone: what it captures, xform must capture
    stock      torch's own ONNX exporter on that exported program
    capture    xform's capture
    optimize   the `exact` preset for ONNX Runtime, verified
    equal      the optimized model against eager: max|a - b| / max|b| over each output, at most 1e-4

Exit code 0 if all that torch.export captures is captured and equal, else 1. The last line is a JSON object:
architectures, exported_by_torch, captured, equal, failed {name: reason}, stock_exporter, largest_error, seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
TIME_LIMIT = 600.0  # seconds for one architecture
STEPS = ("build", "eager", "export", "stock", "capture", "optimize", "run")

Result = dict[str, Any]


def architectures() -> list[str]:
    """All names: `timm/<family>`, `transformers/<type>`."""
    from zoo import timm_families, transformers_types

    return [f"timm/{f}" for f in timm_families.families()] + [f"transformers/{t}" for t in transformers_types.TYPES]


def build(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The module with the arguments of a call."""
    kind, _, key = name.partition("/")
    if kind == "timm":
        from zoo import timm_families

        model, args = timm_families.build(timm_families.SMALLEST[key])
        return model, args, {}
    from zoo import transformers_types

    model, kwargs = transformers_types.build(key)
    return model, (), kwargs


def run_architecture(name: str, connection: multiprocessing.connection.Connection, steps: frozenset[str]) -> None:
    """Child process: take one architecture through all steps and send the result after each."""
    result: Result = {"name": name, "seconds": {}, "done": []}

    @contextmanager
    def step(label: str) -> Iterator[None]:
        result["step"] = label
        start = time.perf_counter()
        yield
        result["seconds"][label] = round(time.perf_counter() - start, 2)
        result["done"].append(label)
        connection.send(result)

    try:
        _steps(name, result, step, steps)
        result.pop("step", None)
    except Exception as error:
        result["reason"] = f"{result.get('step')}: {type(error).__name__}: {str(error)[:600]}"
        result["traceback"] = traceback.format_exc()[-4000:]
    connection.send(result)
    connection.close()


def _steps(name: str, result: Result, step: Any, steps: frozenset[str]) -> None:
    import torch

    from xform.capture import capture_torch
    from xform.capture.torch_pytree import register_classes
    from xform.errors import CaptureError

    torch.set_num_threads(1)
    with step("build"):
        module, args, kwargs = build(name)
    result["parameters"] = sum(p.numel() for p in module.parameters())
    with step("eager"), torch.no_grad():
        expected = module(*_fresh(args), **_fresh(kwargs))
    register_classes([expected, args, kwargs])  # torch.export wants to know caches and other containers
    if "stock" in steps:
        with step("export"), torch.no_grad():
            program = torch.export.export(module, _fresh(args), _fresh(kwargs), strict=False)
        result["stock"] = _stock(program, step)
        del program
    try:
        with step("capture"):
            captured = capture_torch(module, _fresh(args), _fresh(kwargs))
    except CaptureError:
        if "stock" not in steps:  # then whether torch.export alone takes it is not known yet
            with step("export"), torch.no_grad():
                torch.export.export(module, _fresh(args), _fresh(kwargs), strict=False)
            result["step"] = "capture"
        raise
    with step("optimize"):
        optimized = _optimize(captured.model) if "optimize" in steps else _as_captured(captured.model)
    with step("run"):
        outputs = optimized(captured.flatten(_fresh(args), _fresh(kwargs)))
    actual = captured.unflatten(outputs)
    result["error"] = relative_error(actual, expected)
    result["same_class"] = type(actual) is type(expected)


def _fresh(arguments: Any) -> Any:
    """Arguments to give away: modules write into caches that they are given."""
    import copy

    return copy.deepcopy(arguments)


def _stock(program: Any, step: Any) -> str:
    """`""`, or why torch's own exporter refused."""
    import torch

    from xform.capture.torch_onnx import quiet

    reason = ""
    with step("stock"), quiet():
        try:
            torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            reason = f"{type(error).__name__}: {str(error)[:200]}"
    return reason


def _optimize(model: Any) -> Any:
    """The optimized model as a function from named tensors to a list of tensors."""
    import torch

    import xform

    optimized = xform.optimize(model, "cpu", preset="exact")

    def run(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        outputs = optimized({name: tensor.numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(array) for array in outputs.values()]

    return run


def _as_captured(model: Any) -> Any:
    """The captured model itself in ONNX Runtime, its graph optimizations off."""
    import onnx_ir as ir
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)

    def run(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [torch.from_numpy(a) for a in session.run(None, {n: t.numpy() for n, t in inputs.items()})]

    return run


def relative_error(actual: Any, expected: Any) -> float:
    """The largest max|a - b| / max|b| over all tensors of a result; infinite where shapes or special values differ."""
    import torch
    from torch.utils import _pytree as pytree

    worst = 0.0
    left, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    if len(left) != len(right):
        return float("inf")
    for a, b in zip(left, right, strict=True):
        if not isinstance(b, torch.Tensor):
            worst = worst if a == b else float("inf")
            continue
        if a.shape != b.shape or a.dtype != b.dtype or not bool((a.isfinite() == b.isfinite()).all()):
            return float("inf")
        a, b = a[b.isfinite()].double(), b[b.isfinite()].double()
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def verdict(result: Result) -> Result:
    """Add what counts: exported, captured, equal, and the reason where not."""
    done = result["done"]
    result["exported"] = "export" in done or "capture" in done
    result["captured"] = "capture" in done
    result["equal"] = result.get("error", float("inf")) <= TOLERANCE and result.get("same_class", False)
    if result["captured"] and "run" in done and not result["equal"]:
        result["reason"] = f"not equal to eager: relative error {result.get('error'):.2e}"
    return result


class Job:
    """One architecture in its child process."""

    def __init__(self, name: str, context: Any, steps: frozenset[str]) -> None:
        self.name = name
        self.connection, child = context.Pipe(duplex=False)
        self.process = context.Process(target=run_architecture, args=(name, child, steps), daemon=True)
        self.process.start()
        child.close()
        self.start = time.monotonic()
        self.result: Result = {"name": name, "seconds": {}, "done": []}

    def poll(self) -> Result | None:
        """The result when the process has ended or run out of time, else None."""
        try:
            while self.connection.poll():
                self.result = self.connection.recv()
        except EOFError:
            self.process.join()
            if self.process.exitcode:
                self.result["reason"] = f"{self.result.get('step')}: the process died with {self.process.exitcode}"
            return self._finish()
        if time.monotonic() - self.start > TIME_LIMIT:
            self.process.kill()
            self.process.join()
            self.result["reason"] = f"{self.result.get('step')}: not done after {TIME_LIMIT:.0f} s"
            return self._finish()
        return None

    def _finish(self) -> Result:
        self.result["wall"] = round(time.monotonic() - self.start, 1)
        return verdict(self.result)


def run_all(names: list[str], jobs: int, steps: frozenset[str]) -> Iterator[Result]:
    """Results in the order in which they come."""
    # The fork server looks for modules in PYTHONPATH only.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.preload"])  # torch, timm and transformers are imported once, not per model
    waiting, running = list(reversed(names)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Job(waiting.pop(), context, steps))
        time.sleep(0.05)
        for job in list(running):
            if (result := job.poll()) is not None:
                running.remove(job)
                yield result


def summary(results: list[Result], wall: float) -> dict[str, Any]:
    """The last line."""
    steps = {step: round(sum(r["seconds"].get(step, 0.0) for r in results), 1) for step in STEPS}
    failed = {r["name"]: r.get("reason", "") for r in results if r["exported"] and not r["equal"]}
    refused = {r["name"]: r.get("reason", "") for r in results if not r["exported"]}
    return {
        "architectures": len(results),
        "exported_by_torch": sum(r["exported"] for r in results),
        "captured": sum(r["captured"] for r in results),
        "equal": sum(r["equal"] for r in results),
        "failed": failed,
        "not_exported_by_torch": refused,
        "stock_exporter": sum(r.get("stock") == "" for r in results),
        "stock_exporter_refused": {r["name"]: r["stock"] for r in results if r.get("stock")},
        "largest_error": max((r.get("error", 0.0) for r in results), default=0.0),
        "seconds": {**steps, "wall": round(wall, 1)},
    }


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    parser.add_argument("--only", metavar="REGEX", help="architectures whose name matches")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="JSON lines: add results, skip those it has")
    parser.add_argument(
        "--skip",
        choices=["stock", "optimize"],
        action="append",
        default=[],
        help="leave out a step (without stock, torch.export runs alone only where capture failed)",
    )
    options = parser.parse_args()
    start = time.monotonic()
    names = [n for n in architectures() if options.only is None or re.search(options.only, n)]
    results: list[Result] = []
    if options.resume is not None and options.resume.exists():
        results = [verdict(json.loads(line)) for line in options.resume.read_text().splitlines()]
        # Results of a run that left out the stock exporter are no results of one that does not.
        results = [r for r in results if r["name"] in names and ("stock" in r or "stock" in options.skip)]
    done = {r["name"] for r in results}
    steps = frozenset(STEPS) - frozenset(options.skip)
    for result in run_all([n for n in names if n not in done], options.jobs, steps):
        results.append(result)
        if options.resume is not None:
            with options.resume.open("a") as file:
                file.write(json.dumps(result) + "\n")
        state = "equal" if result["equal"] else result.get("reason", "?")
        print(f"[{len(results)}/{len(names)}] {result['name']} {result['wall']:.0f} s: {state}", file=sys.stderr)
    line = summary(results, time.monotonic() - start)
    print(json.dumps(line))
    return 0 if line["captured"] == line["equal"] == line["exported_by_torch"] else 1


if __name__ == "__main__":
    sys.exit(main())

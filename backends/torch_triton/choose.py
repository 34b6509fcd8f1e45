"""Keeping a kernel only where it is faster than torch, shape by shape.

A lowered module is run once on real inputs. Every call of a kernel is timed there against its naive twin, which
torch runs with its own kernels, and the call becomes one of the naive twin where that is as fast. What was found is
remembered in a file by device, versions, way of timing, kernel, and the shapes, dtypes and strides of the arguments, so
a model is measured once on a machine. A module that is recorded as a CUDA graph has its calls timed in such a graph
too: outside of one, launching a small kernel from Python takes longer than the kernel. Triton's choice among the
configurations of a kernel (kernels/tuning.py) comes before: it is made by the first of the timed calls.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from xform.backends.base import Choice
from xform.backends.torch_triton.fuse import fuse_linear
from xform.backends.torch_triton.kernels import Finding, Kernel, kernels
from xform.cachefile import CacheFolder
from xform.text import shown

Timer = Callable[[Callable[..., Any], tuple[Any, ...]], float]
_CALLS = 20
CACHE = CacheFolder("kernels", "timings of kernels")
FILE = "kernels.json"
GAIN = 1.02  # what takes the place of torch's way has to be this much faster: timing is no more exact


def choose(module: GraphModule, inputs: list[Any], timer: Timer | None = None) -> list[dict[str, Any]]:
    """Put torch back in place of kernels that gain nothing on these inputs.

    Args:
        inputs: In the order of the graph.
        timer: Seconds of one call: `recorded_seconds` where the module is, `cuda_seconds` by default.

    Returns:
        A line for each kind of call: kernel, concept, shapes, nodes (of each call), seconds of both, the configurations
        that Triton chose, and whether the kernel is kept.
    """
    chooser = _Chooser(module, timer or cuda_seconds)
    with torch.no_grad():
        chooser.run(*inputs)
    chooser.decisions.save()
    for node in chooser.replaced:
        kernel = chooser.by_target[node.target]
        if kernel.restore is None:
            node.target = kernel.naive
        else:
            kernel.restore(module, node)
    if chooser.replaced:
        fuse_linear(module)
        module.recompile()
    return list(chooser.lines.values())


def torch_alone(module: GraphModule) -> GraphModule:
    """The module with torch in place of all Triton kernels, parameters shared: what a compiler can fuse by itself."""
    graph = copy.deepcopy(module.graph)
    twins = naive_twins()
    for node in graph.nodes:
        node.target = twins.get(node.target, node.target) if node.op == "call_function" else node.target
    return GraphModule(module, graph)


def naive_twins() -> dict[Any, Any]:
    """What torch runs in place of each Triton kernel, by the target of its calls."""
    return {_overload(kernel.op): kernel.naive for kernel in kernels().values() if kernel.tuner is not None}


class Decisions:
    """What was measured on this machine, in this process and earlier ones, by versions and way of timing."""

    def __init__(self, timer: Timer) -> None:
        import triton

        self._known: dict[str, Any] = CACHE.read(FILE, _problem) or {}
        self._measured: dict[str, Any] = {}
        how = getattr(timer, "__name__", type(timer).__name__)
        self._circumstances = f"torch {torch.__version__}, triton {triton.__version__}, {how}"

    def of(self, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is known of `what`, else measured now; remembered, unless it failed."""
        key = f"{self._circumstances}: {what}"
        found: dict[str, Any] = self._known.get(key) or measure()
        if "failed" not in found and key not in self._known:
            self._known[key] = self._measured[key] = found
        return found

    def save(self) -> None:
        """Write it down, if there is anything new, beside what other processes have found meanwhile."""
        if self._measured:
            CACHE.write(FILE, lambda before: {**(before or {}), **self._measured}, _problem)


class _Chooser(Interpreter):
    """Runs a module and decides about each call of a kernel."""

    def __init__(self, module: GraphModule, timer: Timer) -> None:
        super().__init__(module)
        self.decisions = Decisions(timer)
        self.timer = timer
        self.by_target: dict[Any, Kernel] = {_overload(kernel.op): kernel for kernel in kernels().values()}
        self.replaced: list[Node] = []
        self.lines: dict[str, dict[str, Any]] = {}

    def run_node(self, n: Node) -> Any:
        """Time the call if it is one of a kernel, then run it."""
        kernel = self.by_target.get(n.target) if n.op == "call_function" else None
        if kernel is not None:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            if not self._keep(kernel, arguments, n.meta["finding"]):
                self.replaced.append(n)
                return kernel.naive(*arguments)  # it may not even compile for this device
        return super().run_node(n)

    def _keep(self, kernel: Kernel, arguments: tuple[Any, ...], finding: Finding) -> bool:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        key = f"{device_of(tensors[0])}, {kernel.name} {' '.join(map(outline, arguments))}"
        if key not in self.lines:
            found = self.decisions.of(key, lambda: self._compare(kernel, arguments))
            shapes = [list(tensor.shape) for tensor in tensors]
            start = {"kernel": kernel.name, "concept": finding.concept, "shapes": shapes, "nodes": []}
            self.lines[key] = {**start, **found}
        self.lines[key]["nodes"].append(list(finding.nodes))
        return bool(self.lines[key]["keep"])

    def _compare(self, kernel: Kernel, arguments: tuple[Any, ...]) -> dict[str, Any]:
        from triton.errors import TritonError

        from xform.backends.torch_triton.kernels.tuning import choices

        torchs = self.timer(kernel.naive, arguments)
        try:
            ours = self.timer(kernel.op, arguments)
        except TritonError as error:  # it does not compile for this device, or needs more memory than that has
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return {"kernel_seconds": None, "torch_seconds": torchs, "keep": False, "failed": reason}
        keep = torchs >= ours * GAIN
        configurations = choices(kernel.tuner)
        return {"kernel_seconds": ours, "torch_seconds": torchs, "keep": keep, "configurations": configurations}


def settled(found: list[Finding], *, runs_here: bool) -> list[Choice]:
    """What lowering alone decides: every miss, and the uses that `choose` will not question (see `as_choices`)."""
    measured = {name for name, kernel in kernels().items() if kernel.tuner is not None} if runs_here else set()
    return [
        Choice(one.kernel, not one.missed, one.nodes, one.missed, one.concept)
        for one in found
        if one.missed or one.kernel not in measured
    ]


def as_choices(lines: list[dict[str, Any]]) -> list[Choice]:
    """What `choose` decided, place by place."""
    return [
        Choice(line["kernel"], line["keep"], tuple(nodes), _compared(line), line["concept"])
        for line in lines
        for nodes in line["nodes"]
    ]


def _compared(line: dict[str, Any]) -> str:
    if "failed" in line:
        return f"the kernel does not run on this device, torch is kept: {line['failed']}"
    ours, torchs = (f"{1e6 * line[key]:.1f} us" for key in ("kernel_seconds", "torch_seconds"))
    shapes = ", ".join("x".join(map(str, shape)) for shape in line["shapes"])
    gain = "" if line["keep"] else ", which gains nothing: torch is kept"
    return f"the kernel takes {ours}, torch's own {torchs} on {shapes}{gain}"


def _overload(op: Any) -> Any:
    return getattr(op, "default", op)


def device_of(tensor: torch.Tensor) -> str:
    """The name of the device that it is on."""
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else tensor.device.type


def outline(argument: Any) -> str:
    """What timing depends on: dtype, sizes and strides of a tensor, the value of anything else."""
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype}{list(argument.shape)}/{list(argument.stride())}".replace(" ", "")
    return str(argument)


def cuda_seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Seconds of one call, the median of several, between CUDA events."""
    for _ in range(3):
        function(*arguments)
    found = []
    for _ in range(_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        function(*arguments)
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)) / 1e3)
    return sorted(found)[len(found) // 2]


def recorded_seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Seconds of one call, the median of several replays of a CUDA graph of many."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(lambda: function(*arguments), return_mode="median")) / 1e3


def wall_seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Seconds of one call on the CPU."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def _problem(found: Any) -> str | None:
    """Why something read from the cache is not a table of measurements; None where it is one."""
    if not isinstance(found, dict):
        return "it is not a table"
    wrong = next((key for key, entry in found.items() if not _is_measurement(entry)), None)
    return None if wrong is None else f"the entry {shown(wrong, 40)!r} is not a measurement"


def _is_measurement(entry: Any) -> bool:
    """Whether it is what `Decisions.of` is given: of a kernel, or of products side by side (`packing`)."""
    kinds = {"keep": ("kernel_seconds", "torch_seconds"), "packed": ("packed_seconds", "separate_seconds")}
    if not isinstance(entry, dict):
        return False
    times = [entry.get(name) for verdict, names in kinds.items() if type(entry.get(verdict)) is bool for name in names]
    return bool(times) and all(isinstance(one, float) and math.isfinite(one) and one > 0 for one in times)

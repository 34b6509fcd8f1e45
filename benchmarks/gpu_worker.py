"""One row of benchmarks/gpu.py in a process of its own: a JSON line for each contender as soon as it is measured.

    python benchmarks/gpu_worker.py ROW CONTENDER... [--small]      ROW: a model and batch, or "kernels"

With --small there need not be a GPU: models of few layers run on the CPU, kernels in Triton's interpreter.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

SMALL = "--small" in sys.argv
if SMALL:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gpu_models  # noqa: E402
from zoo import vision_stub  # noqa: E402, F401  before timm and transformers

import xform  # noqa: E402
from xform.backends import LowerOptions, get_backend  # noqa: E402
from xform.compilation import Compiled  # noqa: E402
from xform.target import Target  # noqa: E402

DEVICE = "cpu" if SMALL else "cuda"
PRECISION = "bfloat16"
CALLS = 3 if SMALL else 50
WARM_UP = 1 if SMALL else 10
Call = Callable[[], Any]


def wait() -> None:
    """Until the GPU has done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Call) -> float:
    """The median of many calls, between CUDA events where there is a GPU."""
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(CALLS):
        if DEVICE == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
    return sorted(found)[len(found) // 2]


def unlike(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each line once: layers are alike."""
    return [line for index, line in enumerate(lines) if line not in lines[:index]]


def first_tensor(output: Any) -> torch.Tensor:
    """The main result of a call."""
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


def is_dead() -> bool:
    """Whether the device answers nothing any more."""
    try:
        wait()
    except RuntimeError:
        return True
    return False


class Row:
    """One model with its contenders; what they share is made once."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = gpu_models.build(name, SMALL)
        self.here = {key: tensor.to(DEVICE) for key, tensor in self.inputs.items()}
        with torch.no_grad():
            self.want = first_tensor(self.model.to(DEVICE)(**self.here)).double().cpu()
        self.model.cpu()
        self.optimized: Any = None

    def call(self, kind: str) -> Call:
        """What a contender is."""
        if kind.startswith("xform"):
            return self.xform_call(kind.removeprefix("xform-"))
        half = copy.deepcopy(self.model).to(DEVICE).to(torch.bfloat16)
        cast = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in self.here.items()}
        mode = {"eager": None, "compile": "default", "compile-max-autotune": "max-autotune"}[kind]
        run = half if mode is None else torch.compile(half, mode=mode)
        return lambda: run(**cast)

    def xform_call(self, compile_mode: str) -> Call:
        """The optimized model. It is captured once; other modes lower the same graph again, as `optimize` would."""
        if self.optimized is None:
            self.optimized = xform.optimize(
                self.model, target=DEVICE, backend="torch_triton", inputs=self.inputs, precision=PRECISION, verify="off"
            )
        program, *others = self.optimized._programs
        first = program.compiled
        backend = get_backend("torch_triton", Target(DEVICE))
        options = LowerOptions(precision=PRECISION, compile=compile_mode)
        compiled = Compiled(first.graph, backend.lower(first.graph, Target(DEVICE), options), first.report, backend)
        first.close()
        self.optimized._programs = (replace(program, compiled=compiled), *others)
        return lambda: self.optimized(**self.here)

    def facts(self, kind: str) -> dict[str, Any]:
        """What the optimized model says of itself."""
        if not kind.startswith("xform"):
            return {}
        told = self.optimized.artifact.metadata
        kernels = [
            {key: line[key] for key in ("kernel", "shapes", "kernel_seconds", "torch_seconds", "keep")}
            for line in told.get("kernels", [])
        ]
        shown = ("shape", "widths", "packed_seconds", "separate_seconds", "packed", "failed")
        products = [{key: line[key] for key in shown if key in line} for line in told.get("products", [])]
        graph, layout = told.get("cuda_graph"), told.get("layout")
        return {
            "cuda_graph": graph, "compile": told.get("compile"), "layout": layout, "kernels": kernels,
            "products": unlike(products),
        }  # fmt: skip


def contenders(row: str, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """Seconds and error of each contender on one model."""
    shared = Row(row)
    yield {"begun": row}
    for kind in kinds:
        begin = time.perf_counter()
        torch._dynamo.reset()
        call: Call | None = None
        with torch.no_grad():
            try:
                call = shared.call(kind)
                got = first_tensor(call()).double().cpu()
                error = float((got - shared.want).abs().max() / shared.want.abs().max())
                ready = time.perf_counter() - begin
                yield {"kind": kind, "seconds": seconds_of(call), "error": error, "ready": ready, **shared.facts(kind)}
            except Exception as failure:  # the others are to be measured all the same
                yield {"kind": kind, "failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
                if is_dead():
                    os._exit(0)  # nothing works on the device after it, not even an orderly end; the rest starts anew
        del call
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def lowered_for_cuda(row: str) -> dict[str, Any]:
    """Which kernels a GPU would get, without one."""
    model, inputs = gpu_models.build(row, SMALL)
    found = xform.optimize(model, target="cuda", inputs=inputs, precision=PRECISION, verify="off", compile_only=True)
    return {"kind": "lowered", "lowered": found.artifact.metadata["lowered"]}


def bandwidth() -> dict[str, Any]:
    """Share of the bandwidth of a copy that each kernel reaches, in bf16 on 16384 rows of 4096.

    All are timed in CUDA graphs, as launching one from Python takes about as long as it runs. No tensor fits in caches.
    """
    from xform.backends.torch_triton.choose import recorded_seconds
    from xform.backends.torch_triton.kernels import kernels
    from xform.backends.torch_triton.kernels.tuning import choices

    found = kernels()
    rows, columns, heads = (8, 256, 2) if SMALL else (16384, 4096, 32)
    a, b = (torch.randn(rows, columns, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    weight = torch.ones(columns, device=DEVICE, dtype=torch.bfloat16)
    size = a.numel() * a.itemsize
    copied = torch.empty_like(a)
    seconds = seconds_of if SMALL else lambda call: recorded_seconds(call, ())
    fastest = 2 * size / seconds(lambda: copied.copy_(a))
    split = a.reshape(4, rows // 4, heads, 128).transpose(1, 2)
    tables = torch.randn(1, rows // 4, 64, device=DEVICE).to(torch.bfloat16)
    runs: dict[str, tuple[float, str, tuple[Any, ...]]] = {
        "residual_layer_norm": (4, "residual_norm", (a, b, weight, weight, 1e-5, False)),
        "residual_rms_norm": (4, "residual_norm", (a, b, weight, None, 1e-5, True)),
        "gated_unit": (3, "gated_unit", (a, b, "silu")),
        "bias_activation": (2, "bias_activation", (a, weight, "gelu")),
        "rotary_qk": (4, "rotary_qk", (split, split, tables, tables, False)),
    }
    shares, chosen = {}, {}
    for name, (passes, kernel, arguments) in runs.items():
        op = found[kernel].op
        shares[name] = round(passes * size / seconds(lambda op=op, arguments=arguments: op(*arguments)) / fastest, 3)
        chosen[kernel] = choices(found[kernel].tuner)
    return {"kind": "bandwidth", "copy_gb_per_s": fastest / 1e9, "shares": shares, "configurations": chosen}


def main() -> None:
    """Print the lines."""
    row, *kinds = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if row == "kernels":
        print(json.dumps({"begun": row}), flush=True)
        print(json.dumps(bandwidth()), flush=True)
        return
    for line in contenders(row, [kind for kind in kinds if kind != "lowered"]):
        print(json.dumps(line), flush=True)
    if "lowered" in kinds:
        print(json.dumps(lowered_for_cuda(row)), flush=True)


if __name__ == "__main__":
    main()

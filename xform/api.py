"""`optimize`: capture, passes, backend."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from xform.backends import LowerOptions
from xform.capture.onnx_file import capture_onnx
from xform.compilation import Request, compile_graph
from xform.errors import UsageError, XformError
from xform.optimized import Optimized, OptimizedGraph, OptimizedModule, call_arguments
from xform.pipeline.blame import blamed
from xform.pipeline.manager import Progress, VerifyMode
from xform.pipeline.random_inputs import InputCase, random_inputs
from xform.pipeline.reference import OriginalModel
from xform.pipeline.tolerance import UserTolerance
from xform.pipeline.tune import TuneMode
from xform.rewrite.passes import Pass
from xform.target import Target

Model = torch.nn.Module | ExportedProgram | str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

__all__ = ["Model", "Optimized", "optimize"]


def optimize(
    model: Model,
    target: str | Target = "cpu",
    *,
    inputs: Any = None,
    dynamic: Any = None,
    preset: str = "exact",
    passes: Sequence[str | Pass] | None = None,
    backend: str | None = None,
    calibration: Any = None,
    tolerance: UserTolerance | None = None,
    verify: VerifyMode = "final",
    strict: bool = False,
    opset: int | None = None,
    portable: bool = False,
    precision: str | None = None,
    compile: str = "off",
    compile_only: bool = False,
    tune: TuneMode = "off",
    padding: str = "padded",
    progress: Progress | None = None,
) -> Optimized:
    """Make a trained model faster without changing what it computes.

    Args:
        model: A torch module, ExportedProgram or GraphModule; or an ONNX model as path, bytes, ModelProto or
            `onnx_ir.Model`. It is left as it is.
        target: "cpu", "cuda", "edge", "edge:aarch64", ..., or a Target.
        inputs: Example inputs. For a module, its arguments: one tensor, a tuple (positional), a dict (by keyword), or a
            pair of both; without them it is captured at the first call. For an ONNX model, arrays by name (or a list of
            such dicts, or arrays in order): what is verified on, instead of random numbers.
        dynamic: For a module, the sizes that may differ from call to call: None for none (at a first call without
            `inputs`: "auto"), "auto" for batch and sequence dims, or `{"ids": {0: "batch", 1: ("seq", 1, 512)}}`.
            For an ONNX model, whose dims say so themselves: None, "auto", or the range to verify by name,
            `{"batch": (1, 8)}`.
        preset: Which passes run: "exact", or "int8" for matrix products in int8 and float elsewhere.
        passes: Pass names or Pass objects in order, instead of the preset.
        backend: Instead of the target's default.
        calibration: For "int8": an .npz file, a folder of them, or an iterable of inputs (dicts of arrays by name for
            an ONNX model, arguments in any form of `inputs` for a module). Without it, seeded random data, with a
            warning.
        tolerance: Allowed relative error, a number or one per output name, instead of the table per dtype.
        verify: Compare numbers after "each" pass, in the end ("final"), or never ("off").
        strict: Raise where a pass would be rolled back or nothing could be compared.
        opset: ONNX opset of the result; by default the input's, unless an operator that pays needs a newer one.
        portable: Standard ONNX operators only.
        tune: Time lowerings, and other backends that are installed, on this machine, and keep the fastest: "off",
            "quick" or "full". The model as it came is always among them. Decisions are remembered.
        precision: dtype that floats are computed in: "float32", "float16" or "bfloat16"; None for the model's own
            (backend torch_triton).
        compile: Run the result through torch.compile where that is faster: "off", "inductor" or "max-autotune" (backend
            torch_triton).
        compile_only: Lower for a target that is not here; what the backend made is not run and not compared.
        padding: "padded", or "packed": with a key-padding mask, compute only what is a token and give zeros elsewhere.
        progress: Called with what is being done, steps done, and steps in all.

    Returns:
        Something to call like the original; see `OptimizedModule` and `OptimizedGraph`.

    Raises:
        UsageError, ModelError, VerificationError, TargetError: See `xform.errors`.
    """
    lowering = LowerOptions(opset, portable, precision=precision, compile=compile, compile_only=compile_only)
    request = Request.of(
        target, preset, passes, backend, calibration, tolerance, verify, strict, lowering, progress, tune, padding
    )
    if isinstance(model, torch.nn.Module | ExportedProgram):
        return _optimize_module(model, request, inputs, dynamic)
    if not isinstance(model, str | os.PathLike | bytes | onnx.ModelProto | ir.Model):
        raise UsageError(
            f"cannot optimize a {type(model).__name__}",
            hint="give a torch module or ExportedProgram, or an ONNX model as path, bytes, ModelProto or onnx_ir.Model",
        )
    start = time.perf_counter()
    captured = capture_onnx(model, strict=strict)
    source = Path(model).name if isinstance(model, str | os.PathLike) else captured.graph.name or type(model).__name__
    cases = onnx_inputs(captured, inputs, dynamic)
    seconds = time.perf_counter() - start
    try:
        oracle = OriginalModel(model)
        return OptimizedGraph(
            compile_graph(captured, request, source=source, inputs=cases, oracle=oracle, capture_seconds=seconds)
        )
    except XformError:
        raise
    except Exception as error:
        raise blamed(captured, error) from error


def _optimize_module(
    module: torch.nn.Module | ExportedProgram, request: Request, inputs: Any, dynamic: Any
) -> OptimizedModule:
    if isinstance(module, ExportedProgram):
        args, kwargs = call_arguments(inputs) if inputs is not None else module.example_inputs or ((), {})
        optimized = OptimizedModule(module, request, dynamic)
        optimized.prepare(args, kwargs)
        return optimized
    if inputs is None:
        return OptimizedModule(module, request, "auto" if dynamic is None else dynamic)
    optimized = OptimizedModule(module, request, dynamic)
    optimized.prepare(*call_arguments(inputs))
    return optimized


def onnx_inputs(model: ir.Model, inputs: Any, dynamic: Any) -> Any:
    """Input sets to verify an ONNX model on, from the forms that `optimize` takes; None for random ones.

    Raises:
        UsageError: A form or a dim that does not exist.
    """
    if isinstance(dynamic, Mapping) and inputs is None:
        lows, highs = ({name: _bound(name, r, end) for name, r in dynamic.items()} for end in (0, 1))
        return [InputCase(random_inputs(model, sizes=sizes), sizes) for sizes in (lows, highs)]
    if dynamic is not None and dynamic != "auto" and not isinstance(dynamic, Mapping):
        raise UsageError(f"dynamic={dynamic!r} is not known", hint='use None, "auto", or {"batch": (1, 8)}')
    if inputs is None or isinstance(inputs, Mapping):
        return inputs
    if isinstance(inputs, list | tuple) and inputs and all(isinstance(one, Mapping) for one in inputs):
        return list(inputs)
    names = [value.name or "" for value in model.graph.inputs]
    arrays = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    if len(arrays) > len(names):
        raise UsageError(f"{len(arrays)} inputs were given, the model takes {len(names)}: {', '.join(names)}")
    return dict(zip(names, arrays, strict=False))


def _bound(name: str, dims: Any, end: int) -> int:
    match dims:
        case (int() as low, int() as high) if 0 < low <= high:
            return (low, high)[end]
    raise UsageError(f"dynamic[{name!r}] = {dims!r} is not a range", hint='write {"batch": (1, 8)}')

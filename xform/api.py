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

from xform.arguments import check_inputs, check_types, listed_passes, parsed_target, progress_of
from xform.backends import LowerOptions
from xform.capture.input_shapes import InputShapes
from xform.capture.onnx_file import capture_onnx
from xform.compilation import Request
from xform.errors import UsageError, XformError
from xform.limits import Limits, earned_by, limited
from xform.optimized import LoadedModel, Optimized, OptimizedGraph, OptimizedModule, call_arguments, load
from xform.optimized.compiling import compile_and_tell
from xform.optimized.weights import FileWeights
from xform.pipeline.blame import blamed
from xform.pipeline.manager import Progress, VerifyMode
from xform.pipeline.random_inputs import InputCase, random_inputs
from xform.pipeline.reference import OriginalModel
from xform.pipeline.tolerance import UserTolerance
from xform.pipeline.tune import TuneMode
from xform.rewrite.passes import Pass
from xform.target import Target

Model = torch.nn.Module | ExportedProgram | str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

__all__ = ["LoadedModel", "Model", "Optimized", "load", "optimize"]


def optimize(
    model: Model,
    target: str | Target = "cpu",
    *,
    inputs: Any = None,
    dynamic: Any = None,
    input_shapes: InputShapes | None = None,
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
    threads: int | None = None,
    limits: Mapping[str, float] | Limits | None = None,
    progress: Progress | bool | None = None,
) -> Optimized:
    """Make a trained model faster without changing what it computes.

    Args:
        model: A torch module, ExportedProgram or GraphModule; or an ONNX model as path, bytes, ModelProto or
            `onnx_ir.Model`. It is left as it is.
        target: "cpu", "cuda", or a Target.
        inputs: Example inputs. For a module, its arguments: one tensor, a tuple (positional), a dict (by keyword), or a
            pair of both; without them it is captured at the first call. For an ONNX model, arrays by name (or a list of
            such dicts, or arrays in order): what is verified on, instead of random numbers.
        dynamic: For a module, the sizes that may differ from call to call: None for none (at a first call without
            `inputs`: "auto"), "auto" for batch and sequence dims, or `{"ids": {0: "batch", 1: ("seq", 1, 512)}}`.
            For an ONNX model, whose dims say so themselves: None, "auto", or the range to verify by name,
            `{"batch": (1, 8)}`.
        input_shapes: For an ONNX model, sizes of dynamic dims that the result is made for: `{"x": (1, 3, 224, 224)}`.
            A name renames a dim, None or -1 leaves it. Static shapes allow more rewrites.
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
        precision: dtype that floats are computed in: None for the model's own, "float32", "float16", or "bfloat16"
            (backend torch_triton, and openvino where the processor has it). Inputs and outputs keep their dtype.
        compile: Run the result through torch.compile where that is faster: "off", "inductor" or "max-autotune" (backend
            torch_triton).
        compile_only: Lower for a target that is not here; what the backend made is not run and not compared.
        padding: "padded", or "packed": with a key-padding mask, compute only what is a token and give zeros elsewhere.
        threads: Threads of one operator; None for one per physical core. Backend torch_triton sets torch's number,
            which is one for the whole process, while the model runs.
        limits: What the model may ask of this machine, by name, instead of the defaults of `xform.limits.Limits`:
            `{"memory": 2**34, "seconds": 600}`.
        progress: True for a bar, or a function that is called with what is being done, steps done, and steps in all.

    Returns:
        Something to call like the original; see `OptimizedModule` and `OptimizedGraph`.

    Raises:
        UsageError, ModelError, VerificationError, TargetError: See `xform.errors`.
    """
    check_types(
        target=target, preset=preset, backend=backend, verify=verify, tune=tune, padding=padding, precision=precision,
        compile=compile, opset=opset, tolerance=tolerance, strict=strict, portable=portable, compile_only=compile_only,
    )  # fmt: skip
    shown = progress_of(progress)
    lowering = LowerOptions(opset, portable, precision=precision, compile=compile, compile_only=compile_only)
    request = Request.of(
        parsed_target(target).with_threads(threads), preset, listed_passes(passes), backend, calibration, tolerance,
        verify, strict, lowering, shown, tune, padding, limits,
    )  # fmt: skip
    if isinstance(model, torch.nn.Module | ExportedProgram):
        if input_shapes is not None:
            raise UsageError(
                "input_shapes is for ONNX models", hint="a module has the shapes of `inputs`; see `dynamic` for others"
            )
        return _optimize_module(model, request, inputs, dynamic)
    if not isinstance(model, str | os.PathLike | bytes | onnx.ModelProto | ir.Model):
        raise UsageError(
            f"cannot optimize an object of type {type(model).__name__}",
            hint="give a torch module or ExportedProgram, or an ONNX model as path, bytes, ModelProto or onnx_ir.Model",
        )
    with limited(request.limits):
        return _optimize_onnx(model, request, inputs, dynamic, input_shapes)


def _optimize_onnx(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model,
    request: Request,
    inputs: Any,
    dynamic: Any,
    input_shapes: InputShapes | None,
) -> OptimizedGraph:
    start = time.perf_counter()
    captured = capture_onnx(model, strict=request.strict, input_shapes=input_shapes)
    source = Path(model).name if isinstance(model, str | os.PathLike) else captured.graph.name or type(model).__name__
    weights = FileWeights(captured)
    cases = onnx_inputs(captured, inputs, dynamic)
    seconds = time.perf_counter() - start
    try:
        with limited(earned_by(cases)):
            compiled = compile_and_tell(
                captured,
                request,
                [],
                source=source,
                inputs=cases,
                oracle=OriginalModel(model),
                capture_seconds=seconds,
            )
    except XformError:
        raise
    except Exception as error:
        raise blamed(captured, error) from error
    return OptimizedGraph(compiled, weights)


def _optimize_module(
    module: torch.nn.Module | ExportedProgram, request: Request, inputs: Any, dynamic: Any
) -> OptimizedModule:
    check_inputs(inputs)
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
    if isinstance(dynamic, Mapping):
        lows, highs = ({name: _bound(name, r, end) for name, r in dynamic.items()} for end in (0, 1))
        ends = [InputCase(random_inputs(model, sizes=sizes), sizes) for sizes in (lows, highs)]
        given = onnx_inputs(model, inputs, None)
        return [*([given] if isinstance(given, Mapping) else given or ()), *ends]
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

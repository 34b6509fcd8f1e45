"""From a lowered ONNX graph to a compiled OpenVINO model, and to its own file format."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import openvino as ov

from xform.backends.onnxruntime.session import physical_cores
from xform.backends.openvino.dynamic_groups import SETTING
from xform.errors import ModelError, TargetError
from xform.graph import write
from xform.graph.atomic import write_bytes

if TYPE_CHECKING:
    from xform.backends.openvino.runner import OpenVinoRunner


_ELSEWHERE = "leave backend out, or use backend='torch_triton', which runs every dtype"
PRECISION_SETTING = "INFERENCE_PRECISION_HINT"
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def settings_for(threads: int, group: int = 0, precision: str = "float32") -> dict[str, Any]:
    """What a model is compiled with: one request at a time on all cores, in float32 where the graph says float32.

    OpenVINO computes in bfloat16 by default where the processor has it; that is no exact rewrite. By default it also
    rounds what products with int8 weights read to int8, in groups of 32 channels, where the processor has VNNI.

    Args:
        group: Of channels, for products whose inputs are rounded to int8 at run time; 0 where they stay in float.
        precision: dtype of float computations, "float32" or "bfloat16"; values between operators keep their own.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        PRECISION_SETTING: _PRECISIONS[precision],
        SETTING: group,
    }


def read_model(model: ir.Model, folder: Path) -> Any:
    """OpenVINO's form of the graph; `folder` holds the weights as long as it is used.

    Raises:
        TargetError: Its importer refuses the graph.
    """
    file = write.save(model, folder / "model.onnx")[0]
    try:
        return ov.Core().read_model(file)
    except RuntimeError as error:
        raise TargetError(
            f"OpenVINO {ov.__version__.split('-')[0]} cannot read the lowered graph: {_reason(error)}",
            hint=_ELSEWHERE,
        ) from error


def compile_model(model: ir.Model, settings: dict[str, Any]) -> Any:
    """A compiled model for the CPU.

    Raises:
        TargetError: OpenVINO refuses the graph.
    """
    with tempfile.TemporaryDirectory(prefix="xform-openvino-") as folder:
        read = read_model(model, Path(folder))
        try:
            return ov.Core().compile_model(read, "CPU", settings)
        except RuntimeError as error:
            raise TargetError(
                f"OpenVINO cannot compile the lowered graph: {_reason(error)}", hint=_ELSEWHERE
            ) from error


def save_xml(model: ir.Model, path: Path, group: int = 0, precision: str = "float32") -> list[Path]:
    """Write `.xml` and `.bin`, weights in the dtype that they have; `group` and `precision` are in the file.

    See `settings_for`.
    """
    with tempfile.TemporaryDirectory(prefix="xform-openvino-") as folder:
        made = Path(folder, path.name)
        read = read_model(model, Path(folder))
        read.set_rt_info(str(group), ["runtime_options", SETTING])
        read.set_rt_info(_PRECISIONS[precision], ["runtime_options", PRECISION_SETTING])
        ov.save_model(read, made, compress_to_fp16=False)
        weights = write_bytes(path.with_suffix(".bin"), made.with_suffix(".bin").read_bytes())
        return [write_bytes(path, made.read_bytes()), weights]  # last what makes the weights readable


def load_xml(path: Path, threads: int | None) -> OpenVinoRunner:
    """What `save_xml` wrote, compiled for the CPU.

    Raises:
        ModelError: The file cannot be read.
    """
    from xform.backends.openvino.runner import OpenVinoRunner

    try:
        read = ov.Core().read_model(path)
        settings = settings_for(threads or physical_cores())
        if read.has_rt_info(["runtime_options", SETTING]):
            settings[SETTING] = int(read.get_rt_info(["runtime_options", SETTING]).astype(str))
        if read.has_rt_info(["runtime_options", PRECISION_SETTING]):
            settings[PRECISION_SETTING] = read.get_rt_info(["runtime_options", PRECISION_SETTING]).astype(str)
        compiled = ov.Core().compile_model(read, "CPU", settings)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot read the file: {_reason(error)}", where=str(path)) from error
    inputs, outputs = ([_value(port) for port in ports] for ports in (compiled.inputs, compiled.outputs))
    return OpenVinoRunner(compiled, ir.Model(ir.Graph(inputs, outputs, nodes=[]), ir_version=10))


def _value(port: Any) -> ir.Value:
    dims = [dim.get_length() if dim.is_static else None for dim in port.get_partial_shape()]
    dtype = ir.DataType.from_numpy(np.dtype(port.get_element_type().to_dtype()))
    return ir.Value(name=port.get_any_name(), shape=ir.Shape(dims), type=ir.TensorType(dtype))


def _reason(error: Exception) -> str:
    """What OpenVINO says, without its own source lines; unsupported operators are listed at the end of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Check", "Exception from", "FrontEnd API failed"))]
    return " ".join(told or lines or [type(error).__name__])[:400]

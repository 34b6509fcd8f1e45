"""Calling a loaded session with numpy arrays or torch tensors.

`InferenceSession.run` is used, not I/O binding: on the CPU it neither copies contiguous inputs nor outputs, and was
measured faster than binding plus DLPack (docs/onnxruntime-notes.md). Only dtypes that NumPy lacks go through OrtValues.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from xform.backends.base import check_names
from xform.errors import TargetError, UsageError

# dtypes without a NumPy type of their own travel as integers of the same width
_CARRIERS: dict[ir.DataType, Any] = {
    ir.DataType.BFLOAT16: np.uint16,
    ir.DataType.FLOAT8E4M3FN: np.uint8,
    ir.DataType.FLOAT8E4M3FNUZ: np.uint8,
    ir.DataType.FLOAT8E5M2: np.uint8,
    ir.DataType.FLOAT8E5M2FNUZ: np.uint8,
}
_TORCH_DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}


class OnnxRuntimeRunner:
    """A session with the names and dtypes of its inputs and outputs.

    Args:
        session: An onnxruntime InferenceSession.
        weights: Arrays that the session reads its weights from; kept alive with it.
        model: The lowered graph, for the interface.
    """

    def __init__(self, session: Any, weights: list[Any], model: ir.Model) -> None:
        self._session = session
        self._weights = weights
        self._inputs = {value.name or "": value for value in model.graph.inputs}
        self._required = [name for name in self._inputs if name not in model.graph.initializers]
        self.input_names: tuple[str, ...] = tuple(self._inputs)
        self.output_names: tuple[str, ...] = tuple(value.name or "" for value in model.graph.outputs)
        self._output_dtypes = [value.dtype for value in model.graph.outputs]
        dtypes = [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)]
        self._carried = any(dtype in _CARRIERS for dtype in dtypes)

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """See `xform.backends.base.Runner.run`."""
        if self._session is None:
            raise UsageError("this runner was closed", hint="load the artifact again")
        check_names(feeds, self.input_names, self._required)
        as_torch = any(isinstance(value, torch.Tensor) for value in feeds.values())
        try:
            if self._carried:
                return self._run_carried(feeds, as_torch)
            arrays = {name: self._array(name, value) for name, value in feeds.items()}
            outputs = self._session.run(self.output_names, arrays)
        except UsageError:
            raise
        except Exception as error:
            raise _run_error(error) from error
        return [_to_torch(output) for output in outputs] if as_torch else list(outputs)

    def close(self) -> None:
        """See `xform.backends.base.Runner.close`."""
        self._session = None
        self._weights = []

    def _array(self, name: str, value: Any) -> Any:
        """`value` as an array that ONNX Runtime takes, without a copy where it is one already."""
        if isinstance(value, torch.Tensor):
            value = value.detach()
            value = (value if value.device.type == "cpu" else value.cpu()).resolve_conj().resolve_neg().numpy()
        array = value if isinstance(value, list | np.ndarray) else np.asarray(value)
        declared = self._inputs[name]
        if isinstance(array, np.ndarray) and isinstance(declared.type, ir.TensorType):
            _check_array(name, array, declared)
        return array

    def _run_carried(self, feeds: Mapping[str, Any], as_torch: bool) -> list[Any]:
        values = {name: self._ort_value(name, value) for name, value in feeds.items()}
        results = self._session.run_with_ort_values(self.output_names, values)
        outputs: list[Any] = []
        for result, dtype in zip(results, self._output_dtypes, strict=True):
            if dtype not in _CARRIERS:
                outputs.append(_to_torch(result.numpy()) if as_torch else result.numpy())
                continue
            outputs.append(_carried_output(result, dtype, as_torch))
        return outputs

    def _ort_value(self, name: str, value: Any) -> Any:
        dtype = self._inputs[name].dtype
        if dtype not in _CARRIERS:
            return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(self._array(name, value)))
        carrier = _CARRIERS[dtype]
        if isinstance(value, torch.Tensor):
            if value.dtype is not _TORCH_DTYPES[dtype]:
                raise UsageError(f"input {name!r} is {value.dtype}, the model takes {dtype.name.lower()}")
            bits = value.detach().cpu().contiguous().view(torch.uint8).numpy().view(carrier)
        else:
            array = np.ascontiguousarray(value)
            if array.dtype != dtype.numpy():
                raise UsageError(f"input {name!r} is {array.dtype}, the model takes {dtype.name.lower()}")
            bits = array.view(carrier)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(dtype))


def _carried_output(value: Any, dtype: ir.DataType, as_torch: bool) -> Any:
    """A copy of an OrtValue of a dtype that NumPy lacks: as a torch tensor, or as an array of the ml_dtypes type."""
    data = np.frombuffer(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()), dtype.numpy())
    array = data.reshape(value.shape())
    if not as_torch:
        return array
    bits = torch.from_numpy(array.view(np.int16 if dtype.itemsize == 2 else np.uint8).copy())
    return bits.view(_TORCH_DTYPES[dtype])


def _check_array(name: str, array: Any, declared: ir.Value) -> None:
    dtype = declared.dtype
    if dtype is not None and dtype is not ir.DataType.STRING and array.dtype != dtype.numpy():
        hint = f"convert it, for example with .astype({dtype.numpy()})"
        raise UsageError(f"input {name!r} is {array.dtype}, the model takes {dtype.numpy()}", hint=hint)
    shape = declared.shape
    if shape is None:
        return
    if len(shape) != array.ndim:
        raise UsageError(f"input {name!r} has shape {array.shape}, the model takes {shape}")
    for axis, (dim, size) in enumerate(zip(shape, array.shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise UsageError(f"input {name!r} has shape {array.shape}, the model takes {shape}: axis {axis} is fixed")


def _to_torch(output: Any) -> Any:
    if isinstance(output, list):
        return [_to_torch(element) for element in output]
    if not isinstance(output, np.ndarray) or output.dtype.kind in "OSU":
        return output
    return torch.from_numpy(output if output.flags.writeable else output.copy())


def _run_error(error: Exception) -> Exception:
    lines = str(error).strip().splitlines()
    text = lines[0][:400] if lines else type(error).__name__
    return TargetError(
        f"ONNX Runtime failed while running the model: {text}",
        hint="check that the sizes of the inputs agree with each other; `xform verify` compares with the original",
    )

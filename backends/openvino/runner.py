"""Calling a compiled OpenVINO model with numpy arrays or torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino as ov
import torch

from xform.backends.base import check_names
from xform.errors import TargetError, UsageError


class OpenVinoRunner:
    """A compiled model with one infer request per call at a time: a request's memory is its own.

    Args:
        compiled: An openvino CompiledModel.
        model: The lowered graph, for the interface.
    """

    def __init__(self, compiled: Any, model: ir.Model) -> None:
        self._compiled = compiled
        self._idle: list[Any] = [compiled.create_infer_request()]  # append and pop are atomic
        self._inputs = {value.name or "": value for value in model.graph.inputs}
        self._required = [name for name in self._inputs if name not in model.graph.initializers]
        self.input_names: tuple[str, ...] = tuple(self._inputs)
        self.output_names: tuple[str, ...] = tuple(value.name or "" for value in model.graph.outputs)
        self._known = {name for port in compiled.inputs for name in port.get_names()}
        self._outputs = len(compiled.outputs)

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """See `xform.backends.base.Runner.run`."""
        if self._compiled is None:
            raise UsageError("this runner was closed", hint="load the artifact again")
        check_names(feeds, self.input_names, self._required)
        as_torch = any(isinstance(value, torch.Tensor) for value in feeds.values())
        # an input that the graph does not read is none of the compiled model's
        tensors = {name: ov.Tensor(self._array(name, v)) for name, v in feeds.items() if name in self._known}
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            request.infer(tensors, share_outputs=True)
            # the request writes into the same memory at the next call
            outputs = [np.array(request.get_output_tensor(i).data) for i in range(self._outputs)]
        except RuntimeError as error:
            raise TargetError(
                f"OpenVINO failed while running the model: {str(error).strip().splitlines()[-1][:400]}",
                hint="check that the sizes of the inputs agree with each other",
            ) from error
        finally:
            self._idle.append(request)
        return [torch.from_numpy(output) for output in outputs] if as_torch else outputs

    def close(self) -> None:
        """See `xform.backends.base.Runner.close`."""
        self._compiled = None
        self._idle = []

    def _array(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            value = (value if value.device.type == "cpu" else value.cpu()).resolve_conj().resolve_neg().numpy()
        array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        declared = self._inputs[name]
        if declared.dtype is not None and array.dtype != declared.dtype.numpy():
            wanted = declared.dtype.numpy()
            raise UsageError(
                f"input {name!r} is {array.dtype}, the model takes {wanted}",
                hint=f"convert it, for example with .astype({wanted})",
            )
        shape = declared.shape
        if shape is not None:
            _check_shape(name, array.shape, shape)
        return array


def _check_shape(name: str, found: tuple[int, ...], declared: ir.Shape) -> None:
    if len(declared) != len(found):
        raise UsageError(f"input {name!r} has shape {found}, the model takes {declared}")
    for axis, (dim, size) in enumerate(zip(declared, found, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise UsageError(f"input {name!r} has shape {found}, the model takes {declared}: axis {axis} is fixed")

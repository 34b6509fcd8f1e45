"""Calling a lowered module with numpy arrays or torch tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from xform.backends.base import check_names
from xform.backends.torch_triton import packing
from xform.backends.torch_triton.choose import as_choices, choose, cuda_seconds, recorded_seconds, torch_alone
from xform.backends.torch_triton.cuda_graphs import Replayer
from xform.backends.torch_triton.layouts import Layouts
from xform.backends.torch_triton.lower.dtypes import TORCH_DTYPES
from xform.backends.torch_triton.lower.parameters import array_of, torch_of
from xform.errors import TargetError, UsageError

if TYPE_CHECKING:
    from xform.backends.torch_triton import TorchArtifact

_TIMED_CALLS = 7


class TorchRunner:
    """A module on its device, with the names and dtypes of its inputs and outputs.

    The module runs without gradients. Outputs are on the device of the inputs.
    """

    def __init__(self, artifact: TorchArtifact) -> None:
        graph = artifact.model.graph
        self._artifact = artifact
        self._device = torch.device(artifact.target.kind)
        self._inputs = {value.name or "": value for value in graph.inputs}
        self._declared = {name: _Declared.of(value) for name, value in self._inputs.items()}
        self._required = [value.name or "" for value in graph.inputs if value.const_value is None]
        self.input_names: tuple[str, ...] = tuple(self._inputs)
        self.output_names: tuple[str, ...] = tuple(value.name or "" for value in graph.outputs)
        self._module: Any = artifact.module.to(self._device)
        self._call: Callable[..., Any] | None = None
        self._threads = artifact.target.threads if artifact.target.kind == "cpu" else None
        self._convolves = any("conv" in operator.lower() for operator in artifact.metadata["operators"])

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """See `xform.backends.base.Runner.run`."""
        if self._module is None:
            raise UsageError("this runner was closed", hint="load the artifact again")
        check_names(feeds, self.input_names, self._required)
        devices = [value.device for value in feeds.values() if isinstance(value, torch.Tensor)]
        tensors = [self._tensor(name, feeds[name]) if name in feeds else None for name in self.input_names]
        if not self._artifact.examples:
            self._artifact.examples = {
                name: tensor.detach().clone() if isinstance(tensor, torch.Tensor) else tensor
                for name, tensor in zip(self.input_names, tensors, strict=True)
                if tensor is not None
            }
        with torch.no_grad(), self._convolving(), _threads(self._threads):
            try:
                if self._call is None:
                    self._call = self._chosen(tensors)
                outputs = self._call(*tensors)
                if isinstance(self._call, Replayer):
                    self._artifact.metadata["cuda_graph"] = self._call.refused or "recorded"
            except _failures() as error:
                raise _run_error(error) from error
        return [_output(output, devices[0] if devices else None) for output in outputs]

    def close(self) -> None:
        """See `xform.backends.base.Runner.close`."""
        self._module = self._call = None

    def _chosen(self, tensors: list[Any]) -> Callable[..., Any]:
        """The module, or what torch.compile made of it where that was asked for and is faster on the first inputs."""
        recorded = self._device.type == "cuda" and self._is_static()
        told = self._artifact.metadata
        if self._device.type == "cuda" and "kernels" not in told:  # once for each artifact, whose module it changes
            self._choose_layout(tensors, recorded=recorded)
            timer = recorded_seconds if recorded else cuda_seconds
            told["products"] = packing.pack(self._module, tensors, timer)
            told["kernels"] = choose(self._module, tensors, timer)
            self._artifact.choices += packing.as_choices(told["products"]) + as_choices(told["kernels"])
        plain: Callable[..., Any] = Replayer(self._module) if recorded else self._module
        mode = self._artifact.compile
        if mode == "off":
            return plain
        # CUDA graphs are recorded here, not by torch.compile: its outputs are overwritten by the next call
        options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if mode == "max-autotune" else {}
        # it fuses norms, activations and gates itself, and could not fuse anything with a kernel that is there already
        compiled = torch.compile(torch_alone(self._module), dynamic=None if self._is_static() else True, **options)
        compiled = Replayer(compiled) if recorded else compiled
        contenders = {"off": plain, mode: compiled}
        seconds = {name: _seconds(call, tensors, self._device) for name, call in contenders.items()}
        chosen = min(seconds, key=lambda name: seconds[name])
        self._artifact.metadata["compile"] = {"asked": mode, "chosen": chosen, "seconds": seconds}
        return contenders[chosen]

    def _convolving(self) -> contextlib.AbstractContextManager[None]:
        """Without TF32, which torch allows in convolutions (not in products), where float32 is what was asked for."""
        asked = self._device.type == "cuda" and self._artifact.precision is None and self._convolves
        return _IEEE_CONVOLUTIONS if asked else contextlib.nullcontext()

    def _choose_layout(self, tensors: list[Any], *, recorded: bool) -> None:
        """Channels of images first or last, as is faster on the first inputs; a recording for each is timed."""
        layouts = Layouts(self._module)
        module = torch_alone(self._module)  # has the same weights; which kernels run on this device is settled later
        measured = layouts.choose(lambda: _seconds(Replayer(module) if recorded else module, tensors, self._device))
        if measured is not None:
            self._artifact.metadata["layout"] = measured
            self._artifact.choices.append(layouts.as_choice(measured))

    def _is_static(self) -> bool:
        shapes = [value.shape for value in self._inputs.values()]
        return all(shape is not None and all(isinstance(dim, int) for dim in shape) for shape in shapes)

    def _tensor(self, name: str, value: Any) -> Any:
        """`value` as a tensor on the device, without a copy where it is there already."""
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            return [self._tensor_of(element) for element in value]
        tensor = self._tensor_of(value)
        self._declared[name].check(name, tensor)
        return tensor

    def _tensor_of(self, value: Any) -> torch.Tensor:
        tensor = value.detach() if isinstance(value, torch.Tensor) else torch_of(np.asarray(value))
        return tensor if tensor.device == self._device else tensor.to(self._device)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """torch's number of threads inside: one for the whole process, so the one before is put back."""
    if number is None or number == torch.get_num_threads():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Declared:
    """What the graph says of a tensor that is an input, read once: calls of small models are short.

    Attributes:
        dtype: None where it is unknown, or what is fed is no tensor.
        shape: None where the rank is unknown.
        fixed: Axes of fixed size with their sizes.
    """

    dtype: torch.dtype | None
    shape: ir.Shape | None
    fixed: tuple[tuple[int, int], ...]

    @staticmethod
    def of(value: ir.Value) -> _Declared:
        if not isinstance(value.type, ir.TensorType):
            return _Declared(None, None, ())
        dtype = None if value.dtype is None else TORCH_DTYPES.get(value.dtype)
        fixed = tuple((axis, dim) for axis, dim in enumerate(value.shape or ()) if isinstance(dim, int))
        return _Declared(dtype, value.shape, fixed)

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Raise a UsageError if `tensor` is of another dtype, rank or fixed size."""
        if self.dtype is not None and tensor.dtype is not self.dtype:
            hint = f"convert it: .to({self.dtype})"
            raise UsageError(f"input {name!r} is {tensor.dtype}, the model takes {self.dtype}", hint=hint)
        if self.shape is None:
            return
        shape = tensor.shape
        if len(self.shape) != len(shape):
            raise UsageError(f"input {name!r} has shape {tuple(shape)}, the model takes {self.shape}")
        for axis, size in self.fixed:
            if shape[axis] != size:
                taken = f"the model takes {self.shape}: axis {axis} is fixed"
                raise UsageError(f"input {name!r} has shape {tuple(shape)}, {taken}")


def _output(output: Any, device: torch.device | None) -> Any:
    """An output as the caller's kind of value: a tensor on `device`, or an array if that is None."""
    if isinstance(output, (list, tuple)):
        return [_output(element, device) for element in output]
    if not isinstance(output, torch.Tensor):
        return output
    return array_of(output) if device is None else output.to(device)


def _seconds(call: Callable[..., Any], tensors: list[Any], device: torch.device) -> float:
    """The fastest of a few calls, after two that compile and warm up."""
    best = float("inf")
    for index in range(_TIMED_CALLS + 2):
        start = time.perf_counter()
        call(*tensors)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 2:
            best = min(best, time.perf_counter() - start)
    return best


class _IeeeConvolutions(contextlib.AbstractContextManager[None]):
    """cuDNN's convolutions in float32 as float32. A setting of the process, so threads share one change of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                cudnn: Any = torch.backends.cudnn
                if hasattr(cudnn, "conv"):
                    self._before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
                else:  # before torch 2.9
                    self._before, cudnn.allow_tf32 = cudnn.allow_tf32, False

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                cudnn: Any = torch.backends.cudnn
                if hasattr(cudnn, "conv"):
                    cudnn.conv.fp32_precision = self._before
                else:
                    cudnn.allow_tf32 = self._before


_IEEE_CONVOLUTIONS = _IeeeConvolutions()


@functools.cache
def _failures() -> tuple[type[Exception], ...]:
    """What torch raises, and Triton where a kernel does not compile for the sizes at hand."""
    found = (RuntimeError, IndexError, ValueError)
    if importlib.util.find_spec("triton") is None:
        return found
    from triton.errors import TritonError

    return (*found, TritonError)


def _run_error(error: Exception) -> TargetError:
    lines = str(error).strip().splitlines()
    return TargetError(
        f"torch failed while running the model: {lines[0][:400] if lines else type(error).__name__}",
        hint="check that the sizes of the inputs agree with each other; `xform verify` compares with the original",
    )
